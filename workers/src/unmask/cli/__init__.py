"""The ``unmask`` command: one module per subcommand, each with a click object named ``command``.

Commands print results on stdout, and progress and errors on stderr. They import what is slow to load
(torch, torchx, pydantic) when they are called, never at the top of a module.
"""
