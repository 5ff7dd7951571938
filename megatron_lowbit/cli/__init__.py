"""The command line, one file per subcommand: HELP, DESCRIPTION, EXAMPLES, add_arguments(parser), run(arguments)."""
