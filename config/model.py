"""DSEN and S-DSEN, and every variant of the paper's tables: one network whose arguments are the paper's rows.

A rainy image is the sum of a background and a rain layer, O = B + R (section 2.1). Each stage predicts the whole rain
layer of O: stage t + 1 gets O - R_t, and all stages share their weights (section 2.2, figure 2).
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import groupy
from base.devices import autocast_dtype, without_autocast
from base.errors import BadArgument
from fast.convolution import FilterLayer, SharedConv2d, filters_of, shared_filters
from networks.base import Network
from networks.coarse2fine import Coarse2Fine
from networks.php import PHP
from settings import FIELDS, NETWORK_FIELDS, Settings, resolve

SLOPE = 0.2  # of every LeakyReLU, section 3.1
KERNEL, PADDING = 5, 2  # of every convolution but the last, which is 1x1


def _convolution(layer: type[nn.Module], in_channels: int, out_channels: int) -> nn.Module:
    return layer(in_channels, out_channels, KERNEL, padding=PADDING)


def _with_activation(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv0=convolution, relu=nn.LeakyReLU(SLOPE)))


class P4ConvZ2(FilterLayer, groupy.P4ConvZ2):
    """With filters that the stages share."""


class P4ConvP4(FilterLayer, groupy.P4ConvP4):
    """With filters that the stages share."""


class SEBlock(nn.Module):
    """Squeeze and excitation: weighs each channel of (N, C, H, W) by its attention value (section 2.1)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """`means` (N, C) are the channels' over the whole image, if `x` is a part of it."""
        return x * self.fc(x.mean((-2, -1)) if means is None else means)[..., None, None]


class Aggregation(nn.Module):
    """Orientation pooling: the `max` or `mean` of each regular channel, (N, C, 4, H, W) -> (N, C, H, W)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(2) if self.kind == "max" else x.mean(2)


class AggregationConv2d(SharedConv2d):
    """A 5x5 convolution over all channels and orientations: (N, C, 4, H, W) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, -3))  # (N, C, 4, H, W) -> (N, C * 4, H, W); (N, C, H, W) stays


class DSEN(Network):
    """Deep symmetry enhanced network, with self-refining stages (S-DSEN) where `stage_num` > 1.

    Args:
        channel: regular channels of every layer (10 in DSEN, 20 in the CNN).
        depth: number of layers, of which `depth - 3` are P4ConvP4 layers with a residual.
        stage_num: stages, all with the same weights.
        group: "p4", or "z2" for ordinary convolutions.
        aggregation: "conv" (5x5 over all orientations), "max" or "mean" (orientation pooling).
        use_se: weigh the aggregated channels by a squeeze-and-excitation block.
        link: how a layer gets its state of the previous stage: "none", "concat" (self-refining) or "add".
    """

    def __init__(
        self,
        channel: int = 10,
        depth: int = 7,
        stage_num: int = 1,
        group: str = "p4",
        aggregation: str = "conv",
        use_se: bool = True,
        link: str = "none",
    ):
        super().__init__()
        layers = range(depth - 3)
        first, inner, orientations = (P4ConvZ2, P4ConvP4, 4) if group == "p4" else (SharedConv2d, SharedConv2d, 1)
        self.stage_num, self.link = stage_num, link
        self.features_halo = PADDING * (depth - 1)
        self.compiled_stage = None
        self.pre_layer = _with_activation(_convolution(first, 3, channel))
        inputs = 2 * channel if link == "concat" else channel
        self.re_layer = nn.ModuleList(_convolution(inner, inputs, channel) for _ in layers)
        if link != "none":
            self.connect_layers = nn.ModuleList(_with_activation(_convolution(inner, channel, channel)) for _ in layers)
        is_conv = aggregation == "conv"
        self.dec = nn.Sequential(
            _convolution(AggregationConv2d, orientations * channel, channel) if is_conv else Aggregation(aggregation),
            SEBlock(channel, channel // 2) if use_se else nn.Identity(),
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Conv2d(channel, 3, 1),
        )

    output_num = property(lambda self: self.stage_num)

    def _layer(self, index: int, x: Tensor, state: Tensor | None) -> Tensor:
        """Layer `index` with its residual, from its input `x` and, through its connection, its state; shape of `x`."""
        layer = self.re_layer[index]
        if self.link == "none":
            return layer(x) + x
        connection = self.connect_layers[index]
        # The states before stage 1 are zeros, so their connection is LeakyReLU(bias) everywhere.
        constant = F.leaky_relu(connection.conv0.bias, SLOPE) if state is None else None  # (C)
        if self.link == "add":
            x = x + (constant.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2)) if state is None else connection(state))
            return layer(x) + x
        return (layer(x, constant=constant) if state is None else layer(x, connection(state))) + x

    def stage(self, image: Tensor, states: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """One stage: image (N, 3, H, W) to its rain layer (N, 3, H, W) and the layers' states (N, C, 4, H, W)."""
        features, states = self.features(image, states)
        return self.rain_layer(features), states

    def features(self, image: Tensor, states: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """A stage up to its aggregation: image to the aggregated features (N, C, H, W) and the layers' states."""
        with without_autocast(image):
            x = self.pre_layer(image)
        x = x.to(autocast_dtype(x) or x.dtype)
        new_states = []
        for index in range(len(self.re_layer)):
            x = F.leaky_relu_(self._layer(index, x, states[index]), SLOPE)
            new_states.append(x)
        # Orientation pooling does not keep channels-last memory.
        return self.dec[0](x).to(image.dtype).contiguous(memory_format=torch.channels_last), new_states

    def rain_layer(self, features: Tensor, means: Tensor | None = None) -> Tensor:
        """The rest of a stage: features (N, C, H, W) to the rain layer (N, 3, H, W); `means` as in `SEBlock`."""
        _, se, activation, last = self.dec
        with without_autocast(features):
            if isinstance(se, SEBlock):
                features = se(features, means)
            return last(activation(features))

    def forward(self, O: Tensor, stage_num: int | None = None) -> list[Tensor]:
        """Rain layers [R_1, ..., R_T], each (N, 3, H, W), of rainy images `O` (N, 3, H, W) in [0, 1], any H and W.

        `stage_num` runs fewer stages, or more, than the network was built with.
        """
        self.check(O)
        stage, rain_layers, image, states = self._optimized_stage(), [], O, [None] * len(self.re_layer)
        for _ in range(stage_num or self.stage_num):
            R, states = stage(image, states)  # R (N, 3, H, W), each state (N, C, 4, H, W)
            rain_layers.append(R)
            image = O - R
        return rain_layers

    def _optimized_stage(self) -> Callable:
        """`stage` in channels-last memory, with filters made once for all stages, compiled or checkpointed if set."""
        stage = self.compiled_stage if self.compiled_stage and self.training else self.stage
        filters = filters_of(self)

        def optimized(image: Tensor, states: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
            with shared_filters(filters):
                return stage(image.contiguous(memory_format=torch.channels_last), states)

        return self.checkpointed(optimized)

    def compile(self, *arguments, **keywords) -> None:
        """As `nn.Module.compile`, but only for training, and one stage at a time: all stages are the same code."""
        self.compiled_stage = torch.compile(self.stage, *arguments, **keywords)

    def macs_per_pixel(self) -> int:
        """As `Network.macs_per_pixel`; the connections of stage 1, which are constants, count too."""
        return self.stage_num * sum(self.convolutions().values())


NETWORKS = dict(zip(FIELDS["network"].choices, (DSEN, Coarse2Fine, PHP), strict=True))


def build(settings: Settings | str) -> Network:
    """The network of a settings object, or of a preset by its name; its arguments are settings of the same names.

    Raises BadArgument if a setting of another network is not at its default, as it would do nothing.
    """
    if isinstance(settings, str):
        settings = resolve(settings)
    kind = NETWORKS[settings.network]
    arguments = inspect.signature(kind).parameters
    for name in NETWORK_FIELDS[1:]:
        if name not in arguments and getattr(settings, name) != FIELDS[name].default:
            raise BadArgument(f"{name} is no setting of network {settings.network}, which has {', '.join(arguments)}")
    return kind(**{name: getattr(settings, name) for name in arguments})


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
