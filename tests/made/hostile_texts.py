"""Texts that run a script, load something or break the markup of a page that does not escape them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.made.browsing import visited

HOSTILE = {
    "element": "<script>alert(1)</script>",
    "end of a script": "</script><script>alert(2)</script><!--",
    "end of other elements": "</title></style></pre></svg></option></textarea>--><script>alert(3)</script>",
    "picture": "<img src=x onerror=alert(4)>",
    "attribute": "\" autofocus onfocus=alert(5) x=\"' autofocus onfocus='alert(5)",
    "vector graphics": "]]><svg/onload=alert(6)><use href='data:image/svg+xml,<svg onload=alert(6)>'/>",
    "address": "javascript:alert(7)",
    "style": "red;}</style><style>@import 'http://127.0.0.1:9/x';*{background:url(http://127.0.0.1:9/y)}",
    "redirection": '<meta http-equiv="refresh" content="0;url=http://127.0.0.1:9/z"><base href="http://127.0.0.1:9/">',
    "form": '<form action="http://127.0.0.1:9/"><input name=x></form><iframe srcdoc="<script>alert(8)</script>">',
    "template": "{{ 7 * 7 }}${alert(9)}`{% raw %}{{ self.__init__.__globals__ }}",
    "formula": r"$\frac{1}{$ $x$ \$",
    "entities": "&lt;script&gt;alert(10)&lt;/script&gt;&#60;img src=x onerror=alert(10)&#62;",
    "directions": "\u202e<\u2028script\u2029>  \u0001alert(11)",
}
ACTIVE = """() => [...document.querySelectorAll("*")].filter((one) =>
    ["IFRAME", "OBJECT", "EMBED", "BASE", "LINK"].includes(one.tagName)
    || (one.tagName === "SCRIPT" && !["", "text/plain"].includes(one.type))
    || [...one.attributes].some(({ name }) => /^on/i.test(name))
    || ["href", "src", "action", "data"].some((name) => /^\\s*javascript:/i.test(one.getAttribute(name)))
).map((one) => one.outerHTML.slice(0, 200))"""


def check_page(browser: Any, path: Path, scripts: int = 1) -> None:
    """Open a page; fails if it has a problem, as `visited`, or any element that could run or load something."""
    with visited(browser, path) as visit:
        assert visit.page.evaluate(ACTIVE) == []
        assert visit.page.locator("script:not([type])").count() == scripts
        for details in visit.page.locator("details").all():
            details.evaluate("one => (one.open = true)")
        visit.page.mouse.click(5, 5)
        visit.page.keyboard.press("Tab")
        visit.page.wait_for_timeout(50)
