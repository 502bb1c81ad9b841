"""Finding trees in aerial photographs, hand-drawn boxes of the DeepForest project."""
import functools, hashlib, io, zipfile

