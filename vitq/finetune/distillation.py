"""The loss of fine-tuning: what the float network says of an image, and its label.

    L = soft T^2 KL(softmax(z_float / T) || softmax(z / T)) + hard CE(z, label)        the mean over the images, nats

Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015. A network without a classifier has half the squared relative
error of its output in place of the KL, and no labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.gradients import loss as output_loss


@dataclass(frozen=True)
class Distillation:
    """The weights `soft` and `hard`, and the temperature T."""

    soft: float = 1.0
    hard: float = 0.0
    temperature: float = 1.0

    def loss(self, output: Tensor, wanted: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
        """The loss, a scalar.

        Args:
            output: of the quantized network, (B, K), or features.
            wanted: of the float network, of the same shape.
            labels: int64 (B,), or float32 (B, K), a distribution; None where `hard` is 0.
            num_classes: K; 0 for a network without a classifier.
        """
        if num_classes == 0:
            return self.soft * output_loss(wanted, output, 0).mean()
        logits, total = output.float(), torch.zeros((), device=output.device)
        if self.soft:
            log_p, log_q = ((z.float() / self.temperature).log_softmax(-1) for z in (wanted, logits))
            total = total + self.soft * self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        if self.hard:
            assert labels is not None
            total = total + self.hard * torch.nn.functional.cross_entropy(logits, labels)
        return total
