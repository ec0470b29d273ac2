"""Every objective over torch.distributed: the batch is the union of the ranks' rows, in shards of any sizes.

All objectives are formulas around one pairwise reduction, so that the reduction is what goes beyond one process: own rows of x
against the rows of y of every rank (pairs.py), besides sums and counts over the whole batch (shards.py). Formulas stay written
once, in fastcl.functional; there they ask fastcl.batch, which answers for this process's rows or for the union.

    loss = fastcl.functional.clip(x, y, logit_scale=s, group=group)      # on every rank, with its own rows
    loss = fastcl.functional.clip(x, y, logit_scale=s, group=fastcl.Ranks(group, gradient="exact", strategy="ring"))

Each rank gets the value of the whole batch. Gradients follow one rule: every rank calls backward on its own value, and the
gradients are those of the sum over ranks of what backward was called on, as if all ranks were one program.

    gradient="ddp"     the rule as it stands. All ranks hold the same L, so that the sum is world * L: DistributedDataParallel,
                       which averages over ranks, moves parameters exactly as one process with the whole batch would.
    gradient="exact"   the rule divided by world: the gradient of own rows is that of L, and the gradients of whatever the
                       ranks share (a temperature, an encoder) are shares that sum to that of L.
    reduction="none"   own rows' values, which differ from rank to rank: the rule as it stands, under either name. Averaged by
                       DistributedDataParallel it gives the gradient of the mean over ranks of what each made of its rows.

How the rows of others come here (both exact, and the same every time: everything is added in an order fixed by the ranks):

    strategy="gather"  one all-gather of y; own rows against all; partial results home by one all-to-all, added in rank order
    strategy="ring"    one shard at a time passes from rank to rank while the one in hand is worked on; partial results travel
                       with it, and home. Memory is that of two shards, whatever the world.
    strategy="auto"    "gather" while all of y, guides with it, takes at most GATHER_LIMIT bytes a rank, "ring" above

Same-view reductions visit each pair of shards once: each rank meets the next half of the ring, and sends the results of the
columns home. A square on dot goes through all-reduced d x d matrices, and identity through sums, where no groups are in the way.
Sums over pairs, and gathered contrasts, form each logit once, with gradients in the forward (totals.py); the others form it
again in the backward. Before anything large, one small all-gather compares the calls (agreement.py): what differs, or is wrong on
one rank, raises the same error on all of them. It is read on the host, the one synchronisation that a loss makes on a GPU. Under
torch.compile a call is one op of the graph (in_graph.py): one number with its gradients (at_once.py), anything else with a backward
that makes the call again. What modules keep of all ranks' rows is gathered by one op and written by another (kept.py).
"""

from .agreement import MismatchError, agreed
from .call import evened, over_ranks
from .dtensors import own_values
from .kept import gathered_rows, write_gathered, writer
from .ranks import CONVENTIONS, STRATEGIES, Group, Ranks, SavedGroup
from .shards import GATHER_LIMIT, Shards

__all__ = [
    "CONVENTIONS",
    "GATHER_LIMIT",
    "STRATEGIES",
    "Group",
    "MismatchError",
    "Ranks",
    "SavedGroup",
    "Shards",
    "agreed",
    "evened",
    "gathered_rows",
    "over_ranks",
    "own_values",
    "write_gathered",
    "writer",
]
