"""Trains DigitNet and writes weights.pt beside this file: python deploy_examples/01_digits/train.py."""

import torch  # noqa: TID253  this script does nothing without torch
from model import WEIGHTS, DigitNet, splits
from torch.nn import functional  # noqa: TID253  likewise

EPOCHS = 40
BATCH = 64


def shifted(images: torch.Tensor) -> torch.Tensor:
    """The images, each moved by up to one pixel in each direction."""
    padded = functional.pad(images, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(images))).tolist()
    return torch.stack([p[:, r : r + 8, c : c + 8] for p, r, c in zip(padded, rows, columns, strict=True)])


def train() -> DigitNet:
    """The network after EPOCHS passes over the training part; the same on every run."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(1)  # the order of summation, and with it the weights, depends on the number of threads
    images, labels = map(torch.from_numpy, splits()["training"])
    model = DigitNet()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for _ in range(EPOCHS):
        # The incomplete last batch is left out; another order brings its images in the next epoch.
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = functional.cross_entropy(model(shifted(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: DigitNet, part: str) -> float:
    """Share of one part's images that the network names rightly."""
    images, labels = splits()[part]
    with torch.inference_mode():
        predicted = model(torch.from_numpy(images)).argmax(dim=1).numpy()
    return float((predicted == labels).mean())


if __name__ == "__main__":
    trained = train()
    torch.save(trained.state_dict(), WEIGHTS)
    print(f"accuracy on the {len(splits()['evaluation'][0])} held-out images: {accuracy(trained, 'evaluation'):.2%}")
