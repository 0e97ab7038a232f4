"""Run the command line as ``python -m etp_graph``, for systems where the script ``etp-graph`` is not on the path."""

from etp_graph.cli import app

if __name__ == "__main__":
    app(prog_name="etp-graph")
