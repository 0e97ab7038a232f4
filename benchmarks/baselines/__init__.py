"""The peers' own code, with the recipes that their authors published."""
