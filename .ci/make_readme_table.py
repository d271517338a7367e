"""Write README's table of models anew, from the registry: python .ci/make_readme_table.py."""

import re
from pathlib import Path

from brainfm.hub.card import model_table

README = Path(__file__).parents[1] / "README.md"

if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    made, found = re.subn(
        r"(?<=<!-- models -->\n).*?(?=\n<!-- /models -->)", lambda _: model_table(), text, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f"{README}: its table stands between one <!-- models --> and one <!-- /models -->")
    README.write_text(made, encoding="utf-8")
