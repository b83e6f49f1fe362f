"""Random and trained adapters on packed models, for tests."""

import hashlib

import torch

from dynquant.packed.layers import PackedModule

TOKENS = torch.randint(1, 8000, (2, 24), generator=torch.Generator().manual_seed(0))


def randomized(adapted, std: float = 0.02):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return adapted


def logits(model, tokens=TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits.float()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def bytes_of(model) -> str:
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, PackedModule):
            for name in module.types:
                digest.update(getattr(module, name).detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(adapted, steps: int, lr: float = 3e-3, tokens=TOKENS) -> list[float]:
    optimizer = torch.optim.AdamW(list(trainable(adapted).values()), lr=lr)
    losses = []
    for _ in range(steps):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
