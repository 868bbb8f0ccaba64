"""``python -m smidgen``."""

from smidgen.cli.main import main

main()
