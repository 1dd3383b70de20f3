"""FlexLoRA by hand: the method of arXiv 2402.11505 on one linear layer, in plain torch.

    python examples/flexlora_by_hand.py

Eight clients hold noisy linear tasks that share one rank-6 change of a frozen weight W [out, in].
Client k can train LoRA factors of rank r_k only; its rows show a part of the inputs. Each round:

    server -> k:   B, A with s B A = T_{r_k}(G)          the best rank-r_k approximation of G
    client k:      a few steps of Adam on B and A
    k -> server:   B_k, A_k, n_k
    server:        G = sum_k p_k s_k B_k A_k,  p_k = n_k / sum_j n_j

Averaging the factors instead of the products would be another matrix: mean(B) mean(A) is not
mean(B A), and factors of unequal rank cannot be averaged at all.
"""

import torch

OUT, IN, ALPHA, ROUNDS, STEPS = 24, 32, 16.0, 5, 20
RANKS = (1, 2, 2, 4, 4, 8, 8, 16)
EXAMPLES = (30, 50, 20, 80, 40, 60, 90, 70)


def truncate(G, rank, draws):
    """``B [out, rank]``, ``A [rank, in]`` with ``(alpha / rank) B A = T_rank(G)``."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    known = int((S > 1e-10).sum())  # beyond these directions: random rows, which can still train
    A = torch.randn(rank, IN, generator=draws) / IN**0.5
    B = torch.zeros(OUT, rank)
    top = min(rank, known)
    A[:top], B[:, :top] = Vh[:top], U[:, :top] * S[:top] / (ALPHA / rank)
    return B, A


def loss_of(W, B, A, X, Y):
    scaling = ALPHA / A.shape[0]
    return (X @ W.T + scaling * (X @ A.T) @ B.T - Y).square().mean()


def train(W, B, A, X, Y):
    """Local training: W is frozen, only the factors move."""
    B, A = B.clone().requires_grad_(), A.clone().requires_grad_()
    optimizer = torch.optim.Adam([B, A], lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(W, B, A, X, Y).backward()
        optimizer.step()
    return B.detach(), A.detach()


def aggregate(updates):
    """``G = sum_k p_k s_k B_k A_k`` of ``(B, A, num_examples)``."""
    total = sum(n for _, _, n in updates)
    return sum(n / total * (ALPHA / A.shape[0]) * B @ A for B, A, n in updates)


def federation(seed=0):
    """Rounds of FlexLoRA; yields what clients were sent, what came back, ``G`` and the loss."""
    draws = torch.Generator().manual_seed(seed)
    W = torch.randn(OUT, IN, generator=draws) / IN**0.5
    wanted = torch.randn(OUT, 6, generator=draws) @ torch.randn(6, IN, generator=draws) / 6
    data = []
    for n in EXAMPLES:
        X = torch.randn(n, IN, generator=draws) * (torch.rand(IN, generator=draws) < 0.7)
        data.append((X, X @ (W + wanted).T + 0.01 * torch.randn(n, OUT, generator=draws)))
    G = torch.zeros(OUT, IN)
    for _ in range(ROUNDS):
        sent = [truncate(G, rank, draws) for rank in RANKS]
        trained = [train(W, B, A, X, Y) for (B, A), (X, Y) in zip(sent, data, strict=True)]
        updates = [(B, A, n) for (B, A), n in zip(trained, EXAMPLES, strict=True)]
        G = aggregate(updates)
        yield sent, updates, G, sum(float((X @ (W + G).T - Y).square().mean()) for X, Y in data)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    for server_round, (_, _, _, loss) in enumerate(federation(), start=1):
        print(f"round {server_round}: loss {loss / len(RANKS):.4f}")
