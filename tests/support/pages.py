"""What is in the page of a report."""

import json
import re
from typing import Any


def data_of(text: str) -> dict[str, Any]:
    """The data that a page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])
