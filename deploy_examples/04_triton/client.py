"""Asks the server what an image shows: python client.py IMAGE [URL]. Needs tritonclient[http] and pillow."""

import sys

import numpy as np
from PIL import Image  # noqa: TID253  a program of its own
from tritonclient import http

MODEL = "digit-images-ort-cpu-image"


def main():
    file, url = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "localhost:8000"
    pixels = np.asarray(Image.open(file).convert("RGB"))  # uint8 [height, width, 3], as it is
    image = http.InferInput("raw_image", list(pixels.shape), "UINT8")
    image.set_data_from_numpy(pixels)
    with http.InferenceServerClient(url) as client:
        logits = client.infer(MODEL, [image]).as_numpy("output")
    print(int(np.argmax(logits)))


if __name__ == "__main__":
    main()
