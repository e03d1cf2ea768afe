"""Prints the lowest versions that pyproject.toml declares, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for each in [*project["dependencies"], *project["optional-dependencies"]["cli"]]:
    print(re.sub(r"(\[.*\])?>=", "==", each))
