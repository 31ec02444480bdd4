"""Float models that coremltools' own PyTorch front end has converted, against PyTorch."""

from pathlib import Path

import numpy as np
import pytest

from qdeploy.backends.coreml.interpreter import load_package
from tests.backends.coreml.mil import tools

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")
nn, F = torch.nn, torch.nn.functional
pytestmark = pytest.mark.filterwarnings("ignore")


# Shapes are written as numbers: coremltools 9 cannot convert int(x.shape[0]) with numpy 2.4.


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))
        self.short = nn.Conv2d(8, 16, 1, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = F.relu(self.body(x) + self.short(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Hardswish(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.ReLU6(),
        nn.Conv2d(8, 12, 1),
        nn.Hardsigmoid(),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.PReLU(12),
        nn.Flatten(),
        nn.Linear(12 * 9 * 9, 4),
        nn.LogSoftmax(1),
    )


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.same = nn.Conv2d(8, 8, (3, 2), padding="same", groups=8)

    def forward(self, x):
        x = F.silu(self.stem(x))
        x = x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.same(F.pad(x, (1, 0, 2, 1), mode="reflect"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16))
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(2, -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.norm(x)).reshape(2, 17, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 17, 16)
        x = x + self.out(y)
        return self.last(x + self.mlp(x))[:, 0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids, mask):
        x = self.norm(self.words(ids) + self.places(torch.arange(5)))
        q, k, v = (part(x).view(2, 5, 2, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        scores = scores.masked_fill((mask == 0)[:, None, None], -1e4)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16)
        weights = mask.unsqueeze(-1).float()
        return torch.tanh((x * weights).sum(1) / weights.sum(1).clamp(min=1e-9))


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.depth = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y), approximate="tanh"))
        return x + y.permute(0, 3, 1, 2)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(16, affine=True)
        self.last = nn.Conv2d(16 + 16 + 8, 4, 1)

    def forward(self, x):
        a = F.leaky_relu(self.group(self.first(x)), 0.1)
        b = F.elu(self.instance(self.second(F.max_pool2d(a, 2, 2))))
        linear = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        nearest = F.interpolate(b, scale_factor=2, mode="nearest")
        return F.pixel_shuffle(self.last(torch.cat([self.up(b), linear, nearest], 1)), 2)


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 6)
        self.layers = kind(6, 5, num_layers=2, batch_first=True, bidirectional=kind is nn.LSTM)

    def forward(self, ids):
        y, _ = self.layers(self.words(ids))
        return y, y.amax(1), y.argmax(-1).to(torch.int32)


def audio() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 8, 9, 4, 4),
        nn.BatchNorm1d(8),
        nn.Softplus(),
        nn.MaxPool1d(3, 2, ceil_mode=True),
        nn.ConvTranspose1d(8, 4, 4, 2, 1),
        nn.Softsign(),
        nn.LocalResponseNorm(3),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Softmax(-1),
    )


class Odds(nn.Module):
    """What the others have not: indexing, sorting, sums along an axis, triangles, tiles, comparisons."""

    def forward(self, x):
        values, places = x.topk(3, 1)
        sums = torch.cumsum(x, 2).roll(1, 2) * torch.tril(torch.ones(6, 6))
        picked = torch.gather(x, 1, places.flip(1)) - x[:, [2, 0, 1], ::2].repeat(1, 1, 2)
        chosen = torch.where(torch.logical_or((x > 0) & (x < 1), x == 2), x.abs().sqrt(), x.floor() % 3)
        norms = F.normalize(x.std((1, 2), keepdim=True) + x.logsumexp(1, keepdim=True), dim=-1)
        return values, places.to(torch.int32), sums, picked, chosen, norms, torch.einsum("bij,bkj->bik", x, x)


IMAGE = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),)
IDS = torch.tensor([[1, 7, 29, 0, 3], [4, 4, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
MODELS = {
    "resnet": (Residual, IMAGE),
    "mobilenet": (mobile, (F.pad(IMAGE[0], (0, 2, 0, 2)),)),
    "efficientnet": (SqueezeExcite, IMAGE),
    "vit": (Attention, IMAGE),
    "bert": (Encoder, (IDS, MASK)),
    "convnext": (ConvNext, IMAGE),
    "unet": (UNet, IMAGE),
    "lstm": (lambda: Recurrent(nn.LSTM), (IDS,)),
    "gru": (lambda: Recurrent(nn.GRU), (IDS,)),
    "audio": (audio, (torch.randn(2, 1, 97, generator=torch.Generator().manual_seed(2)),)),
    "odds": (Odds, (IMAGE[0][:, 0, :6, :6].contiguous(),)),
}


def convert(module, inputs, path: Path, *, exported: bool, precision: str = "FLOAT32") -> Path:
    ct = tools()
    if exported:
        source, types = torch.export.export(module, inputs).run_decompositions({}), None
    else:
        source = torch.jit.trace(module, inputs)
        types = [
            ct.TensorType(f"x{i}", each.shape, dtype=np.float32 if each.is_floating_point() else np.int32)
            for i, each in enumerate(inputs)
        ]
    model = ct.convert(
        source,
        inputs=types,
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=getattr(ct.precision, precision),
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def built(name: str):
    torch.manual_seed(0)
    module = MODELS[name][0]().eval()
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module, MODELS[name][1]


def run(path: Path, inputs) -> list[np.ndarray]:
    program = load_package(path)
    assert program.unknown_operators == ()
    arrays = [each.numpy() if each.is_floating_point() else each.int().numpy() for each in inputs]
    return list(program.run(dict(zip(program.inputs, arrays, strict=True))).values())


def outputs(module, inputs) -> list[np.ndarray]:
    with torch.no_grad():
        given = module(*inputs)
    return [each.numpy() for each in (given if isinstance(given, tuple) else (given,))]


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_gives_what_torch_gives(name, tmp_path):
    module, inputs = built(name)

    results = run(convert(module, inputs, tmp_path / "model.mlpackage", exported=False), inputs)

    for result, wanted in zip(results, outputs(module, inputs), strict=True):
        assert result.shape == wanted.shape
        assert np.abs(result - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["resnet", "vit", "unet"])
def test_an_exported_model_gives_what_torch_gives(name, tmp_path):
    module, inputs = built(name)

    (result,) = run(convert(module, inputs, tmp_path / "model.mlpackage", exported=True), inputs)

    (wanted,) = outputs(module, inputs)
    assert np.abs(result - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_fp16_rounds_what_each_operation_writes(name, tmp_path):
    module, inputs = built(name)

    (result,) = run(convert(module, inputs, tmp_path / "model.mlpackage", exported=False, precision="FLOAT16"), inputs)

    (wanted,) = outputs(module, inputs)
    error = np.abs(result - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < error < 1e-2
    np.testing.assert_array_equal(result, result.astype(np.float16))
