"""python libgguf_decode.py FOLDER: decodes NAME.npy, rows of bytes of the ggml type whose number is in types.json."""

import json
import sys
from pathlib import Path

import libgguf
import numpy as np

folder = Path(sys.argv[1])
problems = {}
for name, number in json.loads((folder / "types.json").read_text()).items():
    try:
        weights = libgguf.dequantize_rows(np.load(folder / f"{name}.npy"), number)
        np.save(folder / f"{name}.decoded.npy", weights)
        problems[name] = None
    except Exception as error:
        problems[name] = f"{type(error).__name__}: {error}"
print(json.dumps(problems))
