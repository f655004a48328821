"""The published forward pass, written plainly: what the benchmark and the tests compare this code with.

It does what the published code does (its model file on GrouPy's PyTorch port), in its order and with its costs: every
layer makes its filter bank in every call, feature maps lie in memory as N, C, S, H, W, the connected state is
concatenated with the layer's input, and the zero states before stage 1 pass through the connections. It must not be
made faster.

Only networks of p4 whose aggregation is a convolution with an SE block, with link none or concat: the presets `dsen`,
`mdsen` and `sdsen*`. State dicts are those of `model.DSEN`.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import BadArgument
from settings import Settings

SLOPE = 0.2
KERNEL = 5


class GroupConvolution(nn.Module):
    """5x5 convolution (N, I, S, H, W) -> (N, O, 4, H, W) from the plane (S = 1) or from p4 (S = 4) to p4."""

    def __init__(self, in_channels: int, out_channels: int, in_orientations: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, in_orientations, KERNEL, KERNEL))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        copies = [torch.rot90(self.weight.roll(r, 2), r, (-2, -1)) for r in range(4)]
        bank = torch.stack(copies, 1).flatten(0, 1).flatten(1, 2)  # (O, 4, I, S, k, k) -> (O * 4, I * S, k, k)
        y = F.conv2d(x.flatten(1, 2), bank, padding=KERNEL // 2)  # x: (N, I, S, H, W) -> (N, I * S, H, W)
        y = y.unflatten(1, (len(self.bias), 4))  # (N, O * 4, H, W) -> (N, O, 4, H, W)
        return y + self.bias.view(1, -1, 1, 1, 1)  # GrouPy adds the bias behind the convolution


class SqueezeExcitation(nn.Module):
    """Weighs each channel of (N, C, H, W) by its attention value."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, C, 1, 1) -> (N, C)
        return x * self.fc(means)[..., None, None]


def _with_activation(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv0=convolution, relu=nn.LeakyReLU(SLOPE)))


class PlainDSEN(nn.Module):
    """DSEN, or S-DSEN where `linked`; arguments otherwise as those of `model.DSEN`."""

    def __init__(self, channel: int = 10, depth: int = 7, stage_num: int = 1, linked: bool = False):
        super().__init__()
        layers = range(depth - 3)
        self.channel, self.stage_num, self.linked = channel, stage_num, linked
        self.pre_layer = _with_activation(GroupConvolution(3, channel, 1))
        inputs = 2 * channel if linked else channel
        self.re_layer = nn.ModuleList(GroupConvolution(inputs, channel, 4) for _ in layers)
        if linked:
            self.connect_layers = nn.ModuleList(_with_activation(GroupConvolution(channel, channel, 4)) for _ in layers)
        self.dec = nn.Sequential(
            nn.Conv2d(4 * channel, channel, KERNEL, padding=KERNEL // 2),
            SqueezeExcitation(channel),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channel, 3, 1),
        )

    def stage(self, image: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One stage: image (N, 3, H, W) to its rain layer (N, 3, H, W) and the layers' states (N, C, 4, H, W)."""
        x = self.pre_layer(image[:, :, None])  # (N, 3, H, W) -> (N, 3, 1, H, W)
        new_states = []
        for index, layer in enumerate(self.re_layer):
            inputs = torch.cat([x, self.connect_layers[index](states[index])], 1) if self.linked else x
            x = F.leaky_relu(layer(inputs) + x, SLOPE)
            new_states.append(x)
        return self.dec(x.flatten(1, 2)), new_states  # (N, C, 4, H, W) -> (N, C * 4, H, W)

    def forward(self, O: Tensor) -> list[Tensor]:
        """Rain layers [R_1, ..., R_T], each (N, 3, H, W), of rainy images `O` (N, 3, H, W) in [0, 1]."""
        number, _, height, width = O.shape
        states = [O.new_zeros(number, self.channel, 4, height, width) for _ in self.re_layer]
        rain_layers, image = [], O
        for _ in range(self.stage_num):
            R, states = self.stage(image, states)
            rain_layers.append(R)
            image = O - R
        return rain_layers


def build(settings: Settings, state: dict[str, Tensor]) -> PlainDSEN:
    """The plain network of `settings` with the weights `state` of `model.DSEN`. Raises BadArgument for other kinds."""
    kind = (settings.group, settings.aggregation, settings.use_se)
    if kind != ("p4", "conv", True) or settings.link not in ("none", "concat"):
        raise BadArgument(
            "the plain reference has p4, aggregation conv, SE and link none or concat only: "
            f"not {settings.run or 'these settings'}"
        )
    network = PlainDSEN(settings.channel, settings.depth, settings.stage_num, settings.link == "concat")
    network.load_state_dict(state)
    return network


def restore(network: PlainDSEN, O: Tensor) -> list[Tensor]:
    """The background of every stage, each (3, H, W) in [0, 1], of one rainy image (3, H, W) in [0, 1]."""
    with torch.inference_mode():
        return [(O - R[0]).clamp(0, 1) for R in network(O[None])]


def train_step(network: PlainDSEN, optimizer: torch.optim.Optimizer, O: Tensor, B: Tensor) -> float:
    """One step on rainy and clean crops, both (N, 3, H, W) in [0, 1]; returns the squared error summed over stages."""
    loss = sum(F.mse_loss(R, O - B) for R in network(O))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
