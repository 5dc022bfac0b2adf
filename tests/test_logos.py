"""Logos: PNG files of every kind are read, and the badge of the mode is on what comes out."""

import io
import struct
import xml.etree.ElementTree as ET
import zlib

import pytest
from PIL import Image

import envkernel

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><script>alert(1)</script></svg>'


def gradient(mode, width=13, height=7):
    """Return a picture in which every pixel differs from its neighbours."""
    image = Image.new("RGBA", (width, height))
    image.putdata(
        [
            (x * 19 % 256, y * 36 % 256, (x * y) % 256, 255 - 9 * x)
            for y in range(height)
            for x in range(width)
        ]
    )
    return image.convert(mode)


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, "png", **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def interlaced(image):
    """Return an RGBA picture as an interlaced PNG file, which Pillow reads and can't write."""
    rows = []
    for x, y, dx, dy in envkernel._PNG_PASSES:
        if x < image.width and y < image.height:
            for row in range(y, image.height, dy):
                columns = range(x, image.width, dx)
                rows.append(b"\0" + b"".join(bytes(image.getpixel((column, row))) for column in columns))
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 6, 0, 0, 1)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def palette_with_clear_colour():
    image = gradient("RGB").quantize(5)
    return saved(image, transparency=2)


FILES = {
    **{mode: saved(gradient(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "two bits": saved(gradient("RGB").quantize(4), bits=2),
    "four bits": saved(gradient("RGB").quantize(11), bits=4),
    "clear colour of a palette": palette_with_clear_colour(),
    "clear colour": saved(gradient("RGB"), transparency=(0, 0, 0)),
    "interlaced": interlaced(gradient("RGBA")),
    "interlaced and tiny": interlaced(gradient("RGBA", 2, 1)),
    "noise": saved(Image.effect_noise((40, 40), 90).convert("RGB"), optimize=True),
}


@pytest.mark.parametrize("name", FILES)
def test_png_files_are_read_as_pillow_reads_them(name):
    picture = envkernel.read_png(FILES[name])
    expected = Image.open(io.BytesIO(FILES[name])).convert("RGBA")
    assert (picture.width, picture.height) == expected.size
    assert bytes(picture.pixels) == expected.tobytes()


def test_sixteen_bits_are_rounded():
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 300, 65535)):
        image.putpixel((x, 0), value)
    assert bytes(envkernel.read_png(saved(image)).pixels) == bytes([0, 0, 0, 255, 1, 1, 1, 255] + [255] * 4)


def test_what_is_written_is_read_again():
    image = gradient("RGBA")
    data = envkernel.write_png(envkernel.Picture(*image.size, image.tobytes()))
    assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()


GOOD = FILES["RGBA"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        GOOD[:-20],
        GOOD[:60] + b"\0" + GOOD[61:],
        GOOD[:8] + GOOD[33:],
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0\7"))
        + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\7\7"))
        + chunk(b"IEND", b""),
    ],
    ids=["empty", "gif", "cut", "damaged", "headless", "huge", "outside of the palette", "unknown filter"],
)
def test_what_is_no_good_png_file_is_refused(data):
    with pytest.raises(ValueError, match="PNG file"):
        envkernel.read_png(data)


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("source", [(64, 64), (48, 48), (200, 100), (10, 30), (1, 1)])
def test_resizing_keeps_shape_and_colour(source, size):
    picture = envkernel.Picture(*source, bytes([200, 100, 50, 255]) * (source[0] * source[1]))
    result = Image.frombytes("RGBA", (size, size), bytes(envkernel.resize(picture, size).pixels))
    scale = size / max(source)
    width, height = round(source[0] * scale), round(source[1] * scale)
    left, top, right, bottom = result.getbbox()
    assert abs(right - left - width) <= 1
    assert abs(bottom - top - height) <= 1
    assert abs(left - (size - right)) <= 1
    assert result.getpixel((size // 2, size // 2)) == (200, 100, 50, 255)


def test_resizing_is_a_mean_of_what_can_be_seen():
    picture = envkernel.Picture(2, 2, bytes([255, 0, 0, 255, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]))
    assert bytes(envkernel.resize(picture, 1).pixels) == bytes([128, 0, 128, 128])


def test_every_mode_has_a_badge_of_its_own():
    assert {mode.name for mode in envkernel.MODES.values()} <= envkernel.BADGES.keys()
    assert len(set(envkernel.BADGES.values())) == len(envkernel.BADGES)


@pytest.mark.parametrize("mode", envkernel.BADGES)
@pytest.mark.parametrize("size", [64, 32])
def test_the_badge_covers_the_corner_and_nothing_else(mode, size):
    logo = saved(Image.new("RGBA", (size, size), (1, 2, 3, 255)))
    name = f"logo-{size}x{size}.png"
    result = Image.open(io.BytesIO(envkernel.badge_logos({name: logo}, mode, "python")[name]))
    assert result.size == (size, size)
    _, colour = envkernel.BADGES[mode]
    kept = 29 * size // 64
    assert result.getpixel((36 * size // 64, 47 * size // 64))[:3] == colour
    assert {result.getpixel((x, y)) for x in range(kept) for y in range(size)} == {(1, 2, 3, 255)}
    colours = {color for _, color in result.getcolors(size * size)}
    assert any(min(color) > 200 for color in colours), "no white letter or ring"


def test_two_modes_can_be_told_apart():
    logos = {envkernel.badge_logos({}, mode, "python")["logo-64x64.png"] for mode in envkernel.BADGES}
    assert len(logos) == len(envkernel.BADGES)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"logo-64x64.png": GOOD},
        {"logo-32x32.png": GOOD, "logo-svg.svg": SVG},
        {"logo-svg.svg": SVG},
        {"logo-64x64.png": b"broken", "kernel.js": b""},
    ],
    ids=["none", "one size", "both kinds", "svg", "broken"],
)
def test_all_three_logos_come_out_of_whatever_there_is(files):
    logos = envkernel.badge_logos(files, "conda", "R")
    assert sorted(logos) == ["logo-32x32.png", "logo-64x64.png", "logo-svg.svg"]
    for size in (32, 64):
        assert Image.open(io.BytesIO(logos[f"logo-{size}x{size}.png"])).size == (size, size)
    root = ET.fromstring(logos["logo-svg.svg"])
    tags = [element.tag.rpartition("}")[2] for element in root]
    assert tags == ["image", "circle", "path"]
    assert (
        root[0].get("href").startswith("data:image/svg+xml" if "logo-svg.svg" in files else "data:image/png")
    )


def test_the_users_own_logo_replaces_all():
    assert envkernel.own_logos("x.svg", SVG) == {"logo-svg.svg": SVG}
    logos = envkernel.own_logos("x.png", GOOD)
    assert sorted(logos) == ["logo-32x32.png", "logo-64x64.png"]
    kernel = envkernel.Kernel([], files={"logo-svg.svg": SVG, "kernel.js": b"js"})

    class Files(envkernel.Facts):
        def read(self, path):
            return {"/x.png": GOOD}.get(path)

    assert envkernel.logo_files(kernel, "conda", "/x.png", Files()) == {"kernel.js": b"js", **logos}
    with pytest.raises(envkernel.UserError, match="can't be read"):
        envkernel.logo_files(kernel, "conda", "/none.png", Files())


def test_a_logo_of_another_kind_is_refused():
    with pytest.raises(envkernel.UserError, match="not a PNG file") as error:
        envkernel.own_logos("x.gif", b"GIF89a")
    assert error.value.hint == "Give a PNG or SVG file."
