"""The decoder in plain tensor algebra, one sequence and one head at a time, by the definitions of the papers.

reference = ReferenceDecoder(model)  # reads the config and the parameters of the model
assert_close(model(tokens_BS)[0], reference.compute_logits(tokens_BS[0]))
"""

import math

import torch
from torch import Tensor

from dist_llm.models.decoder import Decoder


class ReferenceDecoder:
    """Computes the logits of a decoder without code of dist_llm. All layers have the same kind."""

    def __init__(self, model: Decoder) -> None:
        self.config = model.config
        self.parameters = dict(model.named_parameters())

    def compute_logits(self, tokens_S: Tensor) -> Tensor:
        """Return the logits [S, V] of one sequence."""
        config = self.config
        x_SD = self.embed(tokens_S)
        for layer in range(config.n_layers):
            for sublayer, apply in (("attention", self.attend), ("feedforward", self.apply_feedforward)):
                name, norm = f"blocks.{layer}.{sublayer}", f"blocks.{layer}.norm_{sublayer}"
                if config.norm_order == "pre":
                    x_SD = x_SD + apply(self.normalize(x_SD, norm), name)
                else:
                    x_SD = self.normalize(x_SD + apply(x_SD, name), norm)
        if config.norm_order == "pre":
            x_SD = self.normalize(x_SD, "head.norm")
        head = "embed.tokens.weight" if config.tie_embeddings else "head.out.weight"
        return x_SD @ self.parameters[head].T

    def embed(self, tokens_S: Tensor) -> Tensor:
        """Return the embeddings [S, D] with their positional encoding."""
        x_SD = self.parameters["embed.tokens.weight"][tokens_S]
        if self.config.positions == "learned":
            return x_SD + self.parameters["embed.positions.weight"][: len(tokens_S)]
        if self.config.positions == "sinusoidal":
            for position in range(len(tokens_S)):
                for dim in range(0, self.config.d_model, 2):
                    angle = position / 10_000 ** (dim / self.config.d_model)
                    x_SD[position, dim] += math.sin(angle)
                    x_SD[position, dim + 1] += math.cos(angle)
        return x_SD

    def attend(self, x_SD: Tensor, name: str) -> Tensor:
        """Return the output of causal attention [S, D]."""
        length, head_dim, group = len(x_SD), self.config.head_dim, self.config.n_heads // self.config.n_kv_heads
        q, k, v = (self.project(x_SD, f"{name}.{projection}").split(head_dim, dim=-1) for projection in "qkv")
        is_future = torch.ones(length, length).triu(1).bool()
        outputs = []
        for head in range(self.config.n_heads):
            q_SE, k_SE, v_SE = q[head], k[head // group], v[head // group]
            if self.config.positions == "rope":
                q_SE, k_SE = self.rotate(q_SE), self.rotate(k_SE)
            scores_SS = (q_SE @ k_SE.T / math.sqrt(head_dim)).masked_fill(is_future, -math.inf)
            outputs.append(scores_SS.softmax(-1) @ v_SE)
        return self.project(torch.cat(outputs, dim=-1), f"{name}.out")

    def rotate(self, x_SE: Tensor) -> Tensor:
        """Rotate as complex numbers: (x_i + i x_{i + E/2}) e^{i m theta^{-2i/E}} at position m."""
        length, head_dim = x_SE.shape
        frequencies = [self.config.rope_theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        angles = torch.tensor([[position * frequency for frequency in frequencies] for position in range(length)])
        real, imaginary = x_SE.split(head_dim // 2, dim=-1)
        rotated = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((rotated.real, rotated.imag), dim=-1)

    def apply_feedforward(self, x_SD: Tensor, name: str) -> Tensor:
        """Return the output of the feed-forward layer [S, D]."""
        up = self.project(x_SD, f"{name}.up")
        if self.config.activation == "swiglu":
            gate = self.project(x_SD, f"{name}.gate")
            hidden = gate * gate.sigmoid() * up
        elif self.config.activation == "swiglu_clamped":
            gate = self.project(x_SD, f"{name}.gate").minimum(torch.tensor(7.0))
            hidden = gate / (1 + (-1.702 * gate).exp()) * (up.clip(-7, 7) + 1)
        elif self.config.activation == "gelu":
            hidden = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        else:  # gelu_tanh
            hidden = up * (1 + (math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)).tanh()) / 2
        return self.project(hidden, f"{name}.down")

    def normalize(self, x_SD: Tensor, name: str) -> Tensor:
        """Apply the norm with this name."""
        weight, eps = self.parameters[f"{name}.weight"], self.config.norm_eps
        if self.config.norm == "rmsnorm":
            return x_SD / (x_SD.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        centered = x_SD - x_SD.mean(-1, keepdim=True)
        variance = x_SD.var(-1, keepdim=True, correction=0)
        return self._add_bias(centered / (variance + eps).sqrt() * weight, name)

    def project(self, x: Tensor, name: str) -> Tensor:
        """Apply the linear layer with this name."""
        return self._add_bias(x @ self.parameters[f"{name}.weight"].T, name)

    def _add_bias(self, x: Tensor, name: str) -> Tensor:
        return x + self.parameters[f"{name}.bias"] if self.config.bias else x
