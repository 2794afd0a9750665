"""One file a command: SUMMARY, EXAMPLE, configure(parser), run(args) -> exit code. Parse, call, print; no logic."""
