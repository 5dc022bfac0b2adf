"""Logos: an SVG shows the kernel's own logo with the badge of the mode, and PNG files stay what they are."""

import base64
import xml.etree.ElementTree as ET

import pytest

import envkernel

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><script>alert(1)</script></svg>'
PNG = b"\x89PNG\r\n\x1a\nsmall"
BIG = b"\x89PNG\r\n\x1a\nbig"


def parts(files, mode="conda", language="python"):
    """Return the elements of the logo that is made of a kernel's files."""
    root = ET.fromstring(envkernel.badge_logo(files, mode, language))
    return [(element.tag.rpartition("}")[2], element) for element in root]


def test_every_mode_has_a_badge_of_its_own():
    assert {mode.name for mode in envkernel.MODES.values()} == envkernel.BADGES.keys()
    assert len(set(envkernel.BADGES.values())) == len(envkernel.BADGES)
    assert len({envkernel.badge_logo({}, mode, "R") for mode in envkernel.BADGES}) == len(envkernel.BADGES)


@pytest.mark.parametrize(
    ("files", "kind", "image"),
    [
        ({"logo-32x32.png": PNG, "logo-64x64.png": BIG}, "image/png", BIG),
        ({"logo-32x32.png": PNG, "logo-64x64.png": b"broken"}, "image/png", PNG),
        ({"logo-128x128.png": PNG, "kernel.js": b""}, "image/png", PNG),
        ({"logo-64x64.png": PNG, "logo-svg.svg": SVG}, "image/svg+xml", SVG),
    ],
    ids=["larger", "broken", "other size", "svg"],
)
def test_the_kernels_own_logo_is_below_the_badge(files, kind, image):
    (first, logo), (second, disc), (third, letter) = parts(files)
    assert (first, second, third) == ("image", "circle", "text")
    assert logo.get("href") == f"data:{kind};base64,{base64.b64encode(image).decode()}"
    assert (letter.text, disc.get("fill")) == envkernel.BADGES["conda"]


@pytest.mark.parametrize(("language", "letter"), [("julia", "J"), ("<x>", "<"), ("", None)])
def test_a_kernel_without_a_logo_shows_its_language(language, letter):
    (_, image), *_ = parts({"logo-64x64.png": b"broken", "kernel.js": b""}, language=language)
    tile = ET.fromstring(base64.b64decode(image.get("href").partition(",")[2]))
    assert (tile[0].tag.rpartition("}")[2], tile[1].text) == ("rect", letter)


def test_png_files_are_copied_unchanged():
    kernel = envkernel.Kernel([], files={"logo-64x64.png": PNG, "kernel.js": b"js"})
    made = envkernel.logo_files(kernel, "conda", "", envkernel.Host())
    assert sorted(made) == ["kernel.js", "logo-64x64.png", "logo-svg.svg"]
    assert made["logo-64x64.png"] == PNG


def test_the_users_own_logo_replaces_all():
    class Files(envkernel.Host):
        def read(self, path):
            return {"/x.png": PNG, "/x.svg": SVG, "/x.gif": b"GIF89a"}.get(path)

    bare = envkernel.Kernel([])
    assert envkernel.logo_files(bare, "conda", "/x.svg", Files()) == {"logo-svg.svg": SVG}
    logos = envkernel.logo_files(bare, "conda", "/x.png", Files())
    shown = ET.fromstring(logos.pop("logo-svg.svg"))
    assert [element.get("href") for element in shown] == [
        "data:image/png;base64," + base64.b64encode(PNG).decode()
    ]
    assert logos == {"logo-32x32.png": PNG, "logo-64x64.png": PNG}
    kernel = envkernel.Kernel([], files={"logo-svg.svg": SVG, "kernel.js": b"js"})
    made = envkernel.logo_files(kernel, "conda", "/x.png", Files())
    assert sorted(made) == ["kernel.js", "logo-32x32.png", "logo-64x64.png", "logo-svg.svg"]
    assert base64.b64encode(PNG) in made["logo-svg.svg"], "else the logo of a template would be preferred"
    for path in ("/none.png", "/x.gif"):
        with pytest.raises(envkernel.UserError, match="can't be read as PNG or SVG"):
            envkernel.logo_files(kernel, "conda", path, Files())
