"""The contrast of text in both themes, from the style sheets: at least 4.5 to 1, as WCAG 2.2 asks (1.4.3)."""

import colorsys
import re
from collections.abc import Iterator, Mapping

from .page import Site

LEAST = 4.5
Colour = tuple[float, float, float, float]  # red, green, blue and opacity, each from 0 to 1

# What is written on what, by the names of the theme's variables.
WRITTEN = {
    "color-background-primary": (
        "color-foreground-primary color-foreground-secondary color-foreground-muted color-content-foreground "
        "color-link color-link--hover color-link--visited color-problematic color-api-overall color-api-name "
        "color-api-pre-name color-api-paren color-api-keyword sg-script-out"
    ),
    "color-sidebar-background": (
        "color-sidebar-link-text color-sidebar-link-text--top-level color-sidebar-caption-text "
        "color-sidebar-brand-text color-sidebar-search-text"
    ),
    "color-toc-background": "color-toc-item-text color-toc-item-text--active color-toc-title-text",
    "color-header-background": "color-header-text",
    "color-inline-code-background": "color-foreground-primary color-link color-link--visited color-problematic",
    "color-table-header-background": "color-foreground-primary",
    "color-highlighted-background": "color-foreground-primary",
    "color-highlight-on-target": "color-foreground-primary",
    "color-admonition-title-background--note": "color-foreground-primary",
    "color-admonition-title-background--warning": "color-foreground-primary",
    "color-api-background-hover": "color-api-overall color-api-name color-api-pre-name color-api-paren",
    "color-code-background": "color-code-foreground",
    "sg-script-pre": "color-code-foreground",
    "sg-download-a-background-color": "sg-download-a-color",
    "sg-download-a-hover-background-color": "sg-download-a-color",
}
NAMED = {"transparent": "#0000", "black": "#000", "white": "#fff", "grey": "#808080"}


def low_contrast(site: Site) -> Iterator[str]:
    """Pairs of text and background that are hard to tell apart, of the theme and of highlighted code."""
    rules = [rule for css in sheets(site) for rule in parse(css)]
    for theme in ("light", "dark"):
        variables = variables_of(rules, theme)
        pairs = [(text, name) for name, texts in WRITTEN.items() for text in texts.split()]
        for text, background in pairs:
            try:
                paper = over(colour(f"var(--{background})", variables), page_colour(variables))
                ratio = contrast(colour(f"var(--{text})", variables), paper)
            except ValueError as error:
                yield f"{theme}: {text} on {background}: {error}"
                continue
            if ratio < LEAST:
                yield f"{theme}: {text} on {background} has a contrast of {ratio:.2f}, less than {LEAST}"
        yield from faint_code(rules, theme, variables)


def sheets(site: Site) -> Iterator[str]:
    """The style sheets that the front page names, in order, and its own."""
    for element in site.pages["index.html"].all("link", "style"):
        name = element["href"].partition("?")[0]
        if element.tag == "style":
            yield element.text
        elif name in site.stylesheets:
            yield site.stylesheets[name]


def parse(css: str) -> list[tuple[str, dict[str, str]]]:
    """Selectors and what they set, in order: of the rules for screens, whichever theme the reader has chosen."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    found, start, depth = [], 0, 0
    for place, sign in enumerate(css):
        depth += (sign == "{") - (sign == "}")
        if sign == "}" and depth == 0:
            head, _, body = css[start:place].partition("{")
            start = place + 1
            head = head.rpartition(";")[2].strip().replace('"', "").replace("'", "")
            if head.startswith("@"):
                found += parse(body) if head == "@media not print" else []
            else:
                lines = (line.partition(":") for line in body.split(";"))
                values = {name.strip(): value.strip() for name, _, value in lines if value}
                found += [(each.strip(), values) for each in head.split(",")]
    return found


def variables_of(rules: list[tuple[str, dict[str, str]]], theme: str) -> dict[str, str]:
    """The variables as the page has them: later rules win, and those that name the theme win over all others."""
    general, special = {":root", "body"}, {"body[data-theme]", f"body[data-theme={theme}]"}
    found: dict[str, str] = {}
    for selectors in (general, special):
        for selector, values in rules:
            if selector in selectors:
                found.update({name: value for name, value in values.items() if name.startswith("--")})
    return found


def faint_code(rules: list[tuple[str, dict[str, str]]], theme: str, variables: Mapping[str, str]) -> Iterator[str]:
    """Kinds of words in highlighted code that are hard to read on its background."""
    prefix = ".highlight" if theme == "light" else f"body[data-theme={theme}] .highlight"
    own: dict[str, dict[str, str]] = {}
    for selector, values in rules:
        if re.fullmatch(re.escape(prefix) + r"( \.\w{1,3})?", selector):  # the short classes are those of Pygments
            own.setdefault(selector, {}).update(values)
    if "background" not in own.get(prefix, {}):
        yield f"{theme}: no colours of code"
        return
    paper = over(colour(own[prefix]["background"], variables), page_colour(variables))
    plain = own[prefix].get("color", "var(--color-code-foreground)")
    for selector, values in own.items():
        text = colour(values.get("color", "inherit").replace("inherit", plain), variables)
        ratio = contrast(text, over(colour(values.get("background-color", "transparent"), variables), paper))
        if ratio < LEAST and selector != f"{prefix} .w":  # of white space there is nothing to read
            yield f"{theme}: code in {selector} has a contrast of {ratio:.2f}, less than {LEAST}"


def page_colour(variables: Mapping[str, str]) -> Colour:
    """What lies behind everything."""
    return colour("var(--color-background-primary)", variables)


def colour(value: str, variables: Mapping[str, str]) -> Colour:
    """A colour as CSS writes it."""
    value = value.strip().removesuffix("!important").strip().lower()
    value = NAMED.get(value, value)
    if match := re.fullmatch(r"var\(\s*--([\w-]+)\s*\)", value):
        name = f"--{match[1]}"
        if name not in variables:
            raise ValueError(f"there is no variable {name}")
        return colour(variables[name], variables)
    if match := re.fullmatch(r"#([0-9a-f]{3,8})", value):
        digits = match[1] if len(match[1]) > 4 else "".join(2 * digit for digit in match[1])
        parts = [int(digits[k : k + 2], 16) / 255 for k in range(0, len(digits), 2)]
        return parts[0], parts[1], parts[2], parts[3] if len(parts) > 3 else 1
    if match := re.fullmatch(r"(rgb|hsl)a?\(([^)]*)\)", value):
        numbers = re.findall(r"(-?[\d.]+)(%|deg)?", match[2])
        parts = [float(number) / (100 if unit == "%" else 1) for number, unit in numbers] + [1.0]
        if match[1] == "hsl":
            red, green, blue = colorsys.hls_to_rgb(parts[0] / 360, parts[2], parts[1])
            return red, green, blue, parts[3]
        return parts[0] / 255, parts[1] / 255, parts[2] / 255, parts[3]
    raise ValueError(f"not a colour: {value}")


def over(above: Colour, below: Colour) -> Colour:
    """What is seen of a colour in front of another."""
    red, green, blue = (a * above[3] + b * (1 - above[3]) for a, b in zip(above[:3], below[:3], strict=True))
    return red, green, blue, 1


def contrast(text: Colour, paper: Colour) -> float:
    """The ratio of luminances that WCAG defines, from 1 to 21."""
    low, high = sorted(luminance(each) for each in (over(text, paper), paper))
    return (high + 0.05) / (low + 0.05)


def luminance(seen: Colour) -> float:
    """The relative luminance of WCAG 2.2, of an opaque colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in seen[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
