"""The preprocessing in Kotlin and in Swift computes what the bundle's own does, where their compilers are installed."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdeploy.bundle.packages import android, ios
from qdeploy.bundle.packages.mobile import write_templates
from qdeploy.samples.preprocessing import Preprocessing

CASES = [
    Preprocessing(resize=21, crop=(16, 20), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), color="bgr"),
    Preprocessing(resize=7, crop=5, scale=1 / 127.5, mean=(1.0,), layout="nhwc"),
    Preprocessing(resize=57, mean=(0.3,), std=(-0.7,), color="gray"),
    Preprocessing(crop=(31, 24), scale=1.0),
]
SIZES = [(57, 41), (40, 40), (33, 90), (301, 222)]
"""Width and height of images; Pillow 13 begins with the height of the tallest one, and with the width of the others."""

KOTLIN_MAIN = """
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

fun main(arguments: Array<String>) {
    for ((case, size, from, to) in arguments.toList().chunked(4)) {
        val (width, height) = size.split("x").map { it.toInt() }
        val bytes = File(from).readBytes().map { it.toInt() and 255 }
        val colors = bytes.chunked(3) { (red, green, blue) -> red shl 16 or (green shl 8) or blue }.toIntArray()
        val row = { y: Int -> colors.copyOfRange(y * width, (y + 1) * width) }
        val values = when (case) {
            WHEN
            else -> error(case)
        }
        val result = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
        result.asFloatBuffer().put(values)
        File(to).writeBytes(result.array())
    }
}
"""

SWIFT_MAIN = """
import Foundation

let arguments = CommandLine.arguments.dropFirst().map { $0 }
for start in stride(from: 0, to: arguments.count, by: 3) {
    let size = arguments[start].split(separator: "x").map { Int($0)! }
    let bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: arguments[start + 1])))
    var rgbx: [UInt8] = []
    for i in stride(from: 0, to: bytes.count, by: 3) {
        rgbx += bytes[i..<i + 3]
        rgbx.append(0)
    }
    let (_, values) = normalized(try sized(pixels(width: size[0], height: size[1], rgbx: rgbx)))
    try Data(bytes: values, count: 4 * values.count).write(to: URL(fileURLWithPath: arguments[start + 2]))
}
"""


def run(*command):
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def compiler(name):
    found = shutil.which(name)
    return found or pytest.skip(f"{name} is not installed: the code was parsed, not compiled")


@pytest.fixture
def images(tmp_path):
    """Images of random pixels, by the file of their bytes in red, green, blue."""
    random = np.random.default_rng(7)
    made = {}
    for width, height in SIZES:
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        (tmp_path / f"{width}x{height}").write_bytes(pixels.tobytes())
        made[tmp_path / f"{width}x{height}"] = Image.fromarray(pixels)
    return made


def assert_equal(found: Path, preprocessing, image):
    expected = preprocessing.apply(image)
    np.testing.assert_array_equal(np.fromfile(found, np.float32).reshape(expected.shape), expected)


@pytest.mark.slow
def test_kotlin_prepares_as_the_bundle_does(images, tmp_path):
    kotlinc = compiler("kotlinc")
    for i, case in enumerate(CASES):
        values = {"namespace": f"case{i}", **android._settings(case)}
        write_templates("android", ["src/main/kotlin/Preprocessing.kt"], values, tmp_path / f"case{i}")
    calls = [f'"{i}" -> case{i}.prepared(case{i}.pixels(width, height, row)).values' for i in range(len(CASES))]
    (tmp_path / "Main.kt").write_text(KOTLIN_MAIN.replace("WHEN", "\n".join(calls)))
    run(kotlinc, *sorted(tmp_path.rglob("*.kt")), "-include-runtime", "-d", tmp_path / "all.jar")

    asked = [(i, file) for i in range(len(CASES)) for file in images]
    words = [word for i, file in asked for word in (i, file.name, file, tmp_path / f"{i}-{file.name}")]
    run("java", "-jar", tmp_path / "all.jar", *words)

    for i, file in asked:
        assert_equal(tmp_path / f"{i}-{file.name}", CASES[i], images[file])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_swift_prepares_as_the_bundle_does(case, images, tmp_path):
    swiftc = compiler("swiftc")
    names = ["Sources/Preprocessing.swift", "Sources/Normalization.swift"]
    write_templates("ios", names, ios._settings(case), tmp_path)
    (tmp_path / "main.swift").write_text(SWIFT_MAIN)
    sources = [tmp_path / name for name in (*names, "main.swift")]
    run(swiftc, "-O", *sources, "-o", tmp_path / "prepare")

    words = [word for file in images for word in (file.name, file, tmp_path / f"out-{file.name}")]
    run(tmp_path / "prepare", *words)

    for file, image in images.items():
        assert_equal(tmp_path / f"out-{file.name}", case, image)
