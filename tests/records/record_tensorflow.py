"""Records the same 200 steps in TensorFlow: `python tests/records/record_tensorflow.py`."""

import pathlib

import numpy as np
import tensorflow as tf
from problem import CHECKPOINTS, LEARNING_RATES, NAMES, STEPS, initial, save


def train(scope: str, dtype: tf.DType) -> dict[str, np.ndarray]:
    """Gradient tape, divide by the norm, step."""
    arrays = initial()
    inputs = tf.constant(arrays["inputs"], dtype)
    labels = tf.constant(arrays["labels"])
    variables = [tf.Variable(tf.constant(arrays[n], dtype)) for n in NAMES]
    learning_rate = tf.constant(LEARNING_RATES[scope], dtype)
    losses = []
    checkpoints = []
    for step in range(STEPS):
        with tf.GradientTape() as tape:
            x = inputs[step]
            for i in range(3):
                x = x @ variables[2 * i] + variables[2 * i + 1]
                x = tf.tanh(x) if i < 2 else x
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels[step], x))
        gradients = tape.gradient(loss, variables)
        if scope == "leaf":
            gradients = [g / tf.norm(g) for g in gradients]
        else:
            whole = tf.linalg.global_norm(gradients)
            gradients = [g / whole for g in gradients]
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(learning_rate * gradient)
        losses.append(float(loss))
        if step + 1 in CHECKPOINTS:
            checkpoints.append([v.numpy().copy() for v in variables])
    parameters_at = map(np.stack, zip(*checkpoints, strict=True))
    return {"losses": np.array(losses), **dict(zip(NAMES, parameters_at, strict=True))}


def main() -> None:
    """Records both scopes in both precisions."""
    records = {}
    for scope in LEARNING_RATES:
        for dtype in (tf.float64, tf.float32):
            key = f"{scope}_{dtype.name}"
            records |= {f"{key}_{name}": x for name, x in train(scope, dtype).items()}
    save(str(pathlib.Path(__file__).with_name("tensorflow.npz")), tf.__version__, records)


if __name__ == "__main__":
    main()
