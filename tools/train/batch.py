"""Documents as the model is trained on them."""
import torch


class Batch:
    """Documents laid end to end, and pairs of a row and the token that is to follow it."""

    def __init__(self, documents, tokenizer, rng=None, note_share=0.0):
        ids, at, then, answers, self.documents = [], [], [], [], []
        # Of each branch, where its pairs are: (document, branch, first pair, last).
        self.branches = []
        for d, (trunk, branches) in enumerate(documents):
            all_of_it = rng is not None and rng.random() < note_share
            first = len(ids)

            def put(parts, before):
                for text, is_answer in parts:
                    for token in tokenizer.encode(text):
                        if before is not None and (is_answer or all_of_it):
                            at.append(before)
                            then.append(token)
                            answers.append(is_answer)
                        before = len(ids)
                        ids.append(token)

            put(trunk, None)
            end, spans = len(ids), []
            for i, branch in enumerate(branches):
                begin, pair = len(ids), len(at)
                put(branch, end - 1)
                spans.append((begin, len(ids)))
                self.branches.append((d, i, pair, len(at)))
            self.documents.append(((first, end), spans))
        self.ids, self.at, self.next = torch.tensor(ids), torch.tensor(at), torch.tensor(then)
        self.is_answer = torch.tensor(answers)
