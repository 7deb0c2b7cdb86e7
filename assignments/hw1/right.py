"""Right answers of hw1 that are written in other ways; the first of a question is what its mistakes are made of."""
# ruff: noqa: F821 (the names are those of the scripts)


@right("1a", "draw_distinct", "one permutation a row")
def draw_plain(rows, n, k, generator, allowed=None):
    drawn = []
    for row in range(rows):
        numbers = torch.arange(n)
        if allowed is not None:
            numbers = numbers[allowed[row]]
        order = torch.randperm(len(numbers), generator=generator)
        drawn.append(numbers[order][:k])
    return torch.stack(drawn)


@right("1a", "draw_distinct", "multinomial without replacement")
def draw_multinomial(rows, n, k, generator, allowed=None):
    weights = torch.ones(rows, n) if allowed is None else allowed.float()
    return torch.multinomial(weights, k, replacement=False, generator=generator)


@right("1b", "EpisodeSampler.sample_rows", "one episode after the other, loops")
def rows_plain(self, batch_size=None, features=None):
    chosen, orders = self.draw(batch_size)
    look_up = self.gather if features is None else lambda index: features[index]
    all_images, all_labels = [], []
    for rows, order in zip(chosen, orders, strict=True):
        index, labels = [], []
        for k in range(self.K):
            index.append([int(rows[n, k]) for n in range(self.N)])
            labels.append(list(range(self.N)))
        index.append([int(rows[n, self.K]) for n in order.tolist()])
        labels.append(order.tolist())
        all_images.append(look_up(torch.tensor(index)[None])[0])
        all_labels.append(F.one_hot(torch.tensor(labels), self.N).float())
    images = torch.stack(all_images)
    return images.reshape(len(images), self.K + 1, self.N, -1), torch.stack(all_labels)


@right("1b", "EpisodeSampler.sample_rows", "another order of random draws, float64")
def rows_other_draws(self, batch_size=None, features=None):
    rows, _ = self.draw(batch_size)
    B, N, K = rows.shape[0], self.N, self.K
    order = torch.stack([torch.randperm(N, generator=self.generator) for _ in range(B)])
    query = torch.gather(rows[..., K], 1, order)
    everything = torch.cat([rows[..., :K].permute(0, 2, 1), query.unsqueeze(1)], 1)
    labels = torch.zeros(B, K + 1, N, N, dtype=torch.float64)
    labels[:, :K] = torch.eye(N)
    labels[:, K].scatter_(2, order.unsqueeze(-1), 1.0)
    images = self.gather(everything) if features is None else features[everything]
    return images.double().reshape(B, K + 1, N, -1), labels


@right("2a", "MANN.classify", "one episode after the other")
def classify_plain(self, features, input_labels):
    B, rows, N, D = features.shape
    labels = input_labels.clone()
    labels[:, rows - 1] = 0
    everything = []
    for b in range(B):
        pairs = torch.cat([features[b], labels[b]], dim=2)
        sequence = pairs.reshape(1, rows * N, D + N)
        everything.append(self.read(sequence)[0].reshape(rows, N, N))
    return torch.stack(everything)


@right("2a", "MANN.classify", "labels multiplied by a mask")
def classify_mask(self, features, input_labels):
    B, rows, N, D = features.shape
    mask = torch.ones(rows, 1, 1)
    mask[-1] = 0.0
    sequence = torch.cat((features, input_labels * mask), -1).reshape(B, rows * N, D + N)
    out, _ = self.read(sequence)
    return out.unflatten(1, (rows, N))


@right("2b", "MANN.classify_alone", "the support set read again for every query")
def alone_plain(self, features, input_labels):
    B, _, N, _ = features.shape
    support = torch.cat([features[:, :-1], input_labels[:, :-1]], dim=-1).flatten(1, 2)
    zeros = torch.zeros(B, N)
    preds = []
    for n in range(N):
        query = torch.cat([features[:, -1, n], zeros], dim=-1)
        sequence = torch.cat([support, query.unsqueeze(1)], dim=1)
        preds.append(self.read(sequence)[0][:, -1])
    return torch.stack(preds, dim=1)


@right("2b", "MANN.classify_alone", "states copied once a query")
def alone_states(self, features, input_labels):
    B, _, N, _ = features.shape
    support = torch.cat([features[:, :-1], input_labels[:, :-1]], dim=-1).flatten(1, 2)
    _, ends = self.read(support)
    query = torch.cat([features[:, -1], torch.zeros(B, N, N)], dim=-1)
    copy = lambda s: torch.stack([s] * N, dim=2).flatten(1, 2)
    states = [tuple(copy(s) for s in end) if isinstance(end, tuple) else copy(end) for end in ends]
    return self.read(query.reshape(B * N, 1, -1), states)[0].reshape(B, N, N)


@right("3", "MANN.loss_function", "written out with logsumexp")
def loss_plain(self, preds, labels):
    scores, wanted = preds[:, -1], labels[:, -1]
    of_wanted = (scores * wanted).sum(dim=-1)
    losses = scores.logsumexp(dim=-1) - of_wanted
    return losses.mean()


@right("3", "MANN.loss_function", "cross entropy with probabilities as labels, float64")
def loss_soft(self, preds, labels):
    return F.cross_entropy(preds[:, -1].double().transpose(1, 2), labels[:, -1].double().transpose(1, 2))


@right("4", "evaluate", "one task after the other, losses of the asked tasks alone")
def evaluate_plain(model, sampler, num_tasks, alone=False):
    was_training = model.training
    model.eval()
    sampler.reset()
    accuracies, losses = [], []
    while len(accuracies) < num_tasks:
        images, labels = sampler.sample_rows()
        for b in range(len(images)):
            x, y = images[b : b + 1], labels[b : b + 1]
            queries = model.forward_alone(x, y) if alone else model(x, y)[:, -1]
            if len(accuracies) < num_tasks:
                truth = y[0, -1].argmax(dim=-1)
                right = (queries[0].argmax(dim=-1) == truth).float()
                accuracies.append(right.mean())
                losses.append(F.cross_entropy(queries[0], truth).item())
    if was_training:
        model.train()
    return torch.stack(accuracies), sum(losses) / len(losses)
