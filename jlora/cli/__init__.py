"""The `jlora` command, with one file per subcommand."""
