"""Trains a small network on scikit-learn's handwritten digits, in all processes of a job.

    p2pit run "Digits" -l      in this directory; .compute installs what is needed
    python3 train.py           a single process, without p2pit; leaves its files in out/

Each process has a share of the images, and the same network. In every step each computes the
gradient over a batch of its share; all apply the sum of them, and so keep the same parameters,
which is checked at the end. Rank 0 judges the network after each epoch and saves it in keep/, from
where a job that is run with `-c` goes on.

EPOCHS (in total), BATCH (images per step, of all processes together), LEARNING_RATE, HIDDEN and
SEED may be set with `--env`.
"""

import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.datasets import load_digits

from gang import Gang, GangError

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402, after the choice of what draws

EPOCHS = int(os.environ.get("EPOCHS", 30))
BATCH = int(os.environ.get("BATCH", 64))
LEARNING_RATE = float(os.environ.get("LEARNING_RATE", 0.05))
HIDDEN = int(os.environ.get("HIDDEN", 64))
SEED = int(os.environ.get("SEED", 0))
MOMENTUM = 0.9
TEST_IMAGES = 360

JOB_DIR = Path(os.environ.get("JOB_DIR", "out"))
CHECKPOINT = JOB_DIR / "keep" / "checkpoint.npz"
ARTIFACTS = JOB_DIR / "artifacts"
METRICS = ["epoch", "train_log_loss", "test_log_loss", "test_accuracy"]


class Network:
    """64 pixels, a hidden layer with ReLU, 10 classes. All parameters lie in one vector."""

    def __init__(self, inputs, hidden, classes):
        self.shapes = {
            "hidden_weights": (inputs, hidden),
            "hidden_bias": (hidden,),
            "output_weights": (hidden, classes),
            "output_bias": (classes,),
        }
        self.parameters = np.zeros(sum(map(np.prod, self.shapes.values())))
        random = np.random.default_rng([SEED])
        for name, array in self.named(self.parameters).items():
            if name.endswith("weights"):
                array[:] = random.normal(scale=np.sqrt(2 / array.shape[0]), size=array.shape)

    def named(self, vector):
        """The parts of a vector, as views of it."""
        parts, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + int(np.prod(shape))
            parts[name] = vector[start:end].reshape(shape)
            start = end
        return parts

    def forward(self, images):
        """The hidden layer's activations, and the logarithms of the classes' probabilities."""
        its = self.named(self.parameters)
        hidden = np.maximum(images @ its["hidden_weights"] + its["hidden_bias"], 0)
        scores = hidden @ its["output_weights"] + its["output_bias"]
        scores -= scores.max(axis=1, keepdims=True)
        return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    def loss_and_gradient(self, images, labels):
        """Both summed, not averaged, over the images, of which there may be none."""
        hidden, logs = self.forward(images)
        rows = np.arange(len(labels))
        of_scores = np.exp(logs)
        of_scores[rows, labels] -= 1
        of_hidden = (of_scores @ self.named(self.parameters)["output_weights"].T) * (hidden > 0)

        gradient = np.empty_like(self.parameters)
        of = self.named(gradient)
        of["hidden_weights"][:] = images.T @ of_hidden
        of["hidden_bias"][:] = of_hidden.sum(axis=0)
        of["output_weights"][:] = hidden.T @ of_scores
        of["output_bias"][:] = of_scores.sum(axis=0)
        return -logs[rows, labels].sum(), gradient

    def judge(self, images, labels):
        """Log loss and accuracy."""
        _, logs = self.forward(images)
        loss = -logs[np.arange(len(labels)), labels].mean()
        return loss, (logs.argmax(axis=1) == labels).mean()


def main():
    gang = Gang()
    is_first = gang.rank == 0
    (train_images, train_labels), test = load()
    # The share of this process: together they are all, and none has an image of another's.
    images, labels = train_images[gang.rank :: gang.size], train_labels[gang.rank :: gang.size]
    batch = max(BATCH // gang.size, 1)
    # As many on all ranks; rank 0 has the largest share.
    steps = -(-len(train_images[:: gang.size]) // batch)

    network = Network(images.shape[1], HIDDEN, 10)
    velocity = np.zeros_like(network.parameters)
    metrics = []
    if is_first:
        metrics = resume(network.parameters, velocity)
    done = int(gang.broadcast(np.array([len(metrics)]))[0])
    network.parameters[:] = gang.broadcast(network.parameters)
    velocity[:] = gang.broadcast(velocity)

    here = f"rank {gang.rank} of {gang.size}: {len(images)} of {len(train_images)} images"
    say(f"{here}, from epoch {done + 1} to {EPOCHS}" if done < EPOCHS else f"{here}, trained before")
    if is_first and done >= EPOCHS:
        say(f"{done} epochs are done: for more, set EPOCHS to more")

    for epoch in range(done + 1, EPOCHS + 1):
        order = np.random.default_rng([SEED, epoch, gang.rank]).permutation(len(images))
        epoch_loss, epoch_count = 0.0, 0.0
        for step in range(steps):
            mine = order[step * batch : (step + 1) * batch]
            loss, gradient = network.loss_and_gradient(images[mine], labels[mine])
            total = gang.sum(np.append(gradient, [loss, len(mine)]))
            gradient, (loss, count) = total[:-2], total[-2:]
            velocity = MOMENTUM * velocity - LEARNING_RATE * gradient / count
            network.parameters += velocity
            epoch_loss += loss
            epoch_count += count
        if is_first:
            test_loss, accuracy = network.judge(*test)
            metrics.append([epoch, epoch_loss / epoch_count, test_loss, accuracy])
            save(network.parameters, velocity, metrics)
            say(
                f"epoch {epoch:3} of {EPOCHS}: log loss {metrics[-1][1]:.4f};"
                f" test log loss {test_loss:.4f}, accuracy {accuracy:.4f}"
            )

    digest = hashlib.sha256(network.parameters.tobytes()).digest()
    gang.check_same(digest, "parameters")
    gang.close()
    say(f"parameters {digest.hex()[:16]}: the same in all {gang.size} processes")
    if is_first:
        leave(network, metrics, gang.size, digest)


def load():
    """The images for training and those for the test, with their labels."""
    images, labels = load_digits(return_X_y=True)
    # Not by SEED: a job that goes on with another must not train on images it is tested on.
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16, labels[order]
    return (
        (images[TEST_IMAGES:], labels[TEST_IMAGES:]),
        (images[:TEST_IMAGES], labels[:TEST_IMAGES]),
    )


def save(parameters, velocity, metrics):
    """Replaces the checkpoint at once, so that there is a whole one at any time."""
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    part = CHECKPOINT.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(file, parameters=parameters, velocity=velocity, metrics=np.array(metrics))
        file.flush()
        os.fsync(file.fileno())
    part.replace(CHECKPOINT)


def resume(parameters, velocity):
    """Fills both from the checkpoint, if there is one, and gives the metrics of its epochs."""
    if not CHECKPOINT.exists():
        return []
    with np.load(CHECKPOINT) as saved:
        if saved["parameters"].shape != parameters.shape:
            there, here = saved["parameters"].size, parameters.size
            text = f"{CHECKPOINT} has {there} parameters, not {here}: was HIDDEN another?"
            sys.exit(f"error: {text}")
        parameters[:], velocity[:] = saved["parameters"], saved["velocity"]
        return [[int(epoch), *rest] for epoch, *rest in saved["metrics"].tolist()]


def leave(network, metrics, processes, digest):
    """What people want of it: metrics, a plot and the model."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with open(ARTIFACTS / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([METRICS, *metrics])
    summary = {
        "processes": processes,
        "parameters_sha256": digest.hex(),
        "epochs": [dict(zip(METRICS, values)) for values in metrics],
    }
    (ARTIFACTS / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    np.savez(ARTIFACTS / "model.npz", **network.named(network.parameters))

    epochs, train_losses, test_losses, accuracies = zip(*metrics)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, train_losses, label="training")
    left.plot(epochs, test_losses, label="test")
    left.set(xlabel="epoch", ylabel="log loss", yscale="log")
    left.legend()
    right.plot(epochs, accuracies, color="tab:orange")
    right.set(xlabel="epoch", ylabel="test accuracy")
    figure.savefig(ARTIFACTS / "loss.png", dpi=120)

    result = f"test accuracy {accuracies[-1]:.4f} after {epochs[-1]} epochs"
    say(result)
    if "RESULT_FILE" in os.environ:
        Path(os.environ["RESULT_FILE"]).write_text(result + "\n")


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except GangError as error:
        sys.exit(f"error: {error}")
