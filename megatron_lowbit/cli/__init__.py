"""The command line, one file per subcommand: HELP, DESCRIPTION, EXAMPLES, add_arguments(parser), run(arguments).

These files import what is heavy, and what may be missing, when a command runs: so that others, doctor above all, do.
"""

GATE_FAILED = 3  # exit code of a command that did its work, with a result that is beyond what was allowed
