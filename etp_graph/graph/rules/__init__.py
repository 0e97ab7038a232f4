"""What each operator does to the labels of units."""
