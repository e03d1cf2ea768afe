"""Prints the lowest versions that pyproject.toml declares, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for each in project["dependencies"]:
    print(re.sub(r"(\[.*\])?>=", "==", each))
