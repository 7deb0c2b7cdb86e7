"""Right answers of hw2 that are written in other ways; the first of a question is what its mistakes are made of."""
# ruff: noqa: F821 (the names are those of the scripts)


@right("1a", "prototypes", "one class after the other")
def prototypes_plain(support, num_classes):
    K = support.shape[1] // num_classes
    centres = []
    for n in range(num_classes):
        members = support[:, n * K : (n + 1) * K]
        centres.append(members.mean(dim=1))
    return torch.stack(centres, dim=1)


@right("1a", "prototypes", "product with a matrix, float64")
def prototypes_matrix(support, num_classes):
    K = support.shape[1] // num_classes
    mean = torch.eye(num_classes, dtype=torch.float64).repeat_interleave(K, dim=1) / K
    return torch.einsum("nk,bkd->bnd", mean, support.double())


@right("1b", "squared_distances", "differences")
def distances_plain(points, centres):
    difference = points[:, :, None, :] - centres[:, None, :, :]
    return (difference**2).sum(dim=-1)


@right("1b", "squared_distances", "torch.cdist")
def distances_cdist(points, centres):
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist") ** 2


@right("1c", "episode_loss", "one task after the other behind one call of the encoder")
def episode_plain(encoder, episode, num_classes, dtype):
    support, support_labels, query, query_labels = episode
    B = len(support)
    together = embed(encoder, torch.cat([query, support], dim=1), dtype, norm="batch", momentum=0.1)
    known, asked = together[:, query.shape[1] :], together[:, : query.shape[1]]

    def loss_of(b, known, labels, asked, truth):
        centres = [known[b][labels[b] == c].mean(dim=0) for c in range(num_classes)]
        distances = (asked[b][:, None] - torch.stack(centres)[None]).square().sum(dim=-1)
        return F.cross_entropy(-distances, truth[b])

    total = 0.0
    for b in range(B):
        loss = loss_of(b, known, support_labels, asked, query_labels)
        if support.shape == query.shape:
            loss = (loss + loss_of(b, asked, query_labels, known, support_labels)) / 2
        total = total + loss
    return total / B


@right("2a", "inner_loop", "torch.autograd.grad step by step")
def adapt_plain(theta, step_sizes, support, labels, s):
    p = dict(theta)
    if s.head != "linear":
        p.update(HEADS[s.head](embed(p, support, s, len(support)), s.num_classes))
    names = [name for name in p if name.startswith("head_") or not s.freeze_body]
    path = [dict(p)]
    for sizes in step_sizes:
        with torch.enable_grad():
            here = {k: v.detach().requires_grad_() if s.first_order else v.clone() for k, v in p.items()}
            loss = F.cross_entropy(classify(here, support, s, len(support)), labels)
            grads = torch.autograd.grad(loss, [here[k] for k in names], create_graph=not s.first_order)
        p = dict(p)
        for k, g in zip(names, grads, strict=True):
            p[k] = p[k] - sizes[k] * g
        path.append(p)
    return path


@right("2b", "multi_step_loss", "one step's loss after the other")
def task_plain(theta, step_sizes, support, support_labels, query, query_labels, s, weights):
    path = inner_loop(theta, step_sizes, support, support_labels, s)
    total = 0.0
    for k, weight in enumerate(weights):
        p = path[len(path) - len(weights) + k]
        scores = query_logits(p, support, query, s)
        log_probabilities = scores - scores.logsumexp(dim=1, keepdim=True)
        losses = -log_probabilities.gather(1, query_labels[:, None])
        total = total + weight * losses.mean()
    return total


@right("2b", "task_loss", "from the logarithms of the probabilities")
def loss_plain(theta, step_sizes, support, support_labels, query, query_labels, s):
    p = inner_loop(theta, step_sizes, support, support_labels, s)[-1]
    scores = query_logits(p, support, query, s)
    return -(scores - scores.logsumexp(dim=1, keepdim=True)).gather(1, query_labels[:, None]).mean()


@right("3", "proto_head", "einsum, one class after the other")
def head_plain(support, num_classes):
    K = len(support) // num_classes
    centres = torch.stack([support[n * K : (n + 1) * K].sum(dim=0) / K for n in range(num_classes)])
    bias = -torch.einsum("nd,nd->n", centres, centres)
    return {"head_weight": 2 * centres, "head_bias": bias}


@right("3", "one_step_head", "one class after the other")
def step_plain(support, num_classes):
    K = len(support) // num_classes
    centres = torch.stack([support[n * K : (n + 1) * K].sum(dim=0) / K for n in range(num_classes)])
    weight = (centres - centres.mean(dim=0)) / math.sqrt(centres.shape[1])
    return {"head_weight": weight, "head_bias": torch.zeros(num_classes, dtype=weight.dtype)}
