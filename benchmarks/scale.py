"""What J peers on N devices cost: memory, bytes exchanged and time of a step on each mesh. Formulae only, nothing runs.

A mesh is data x peer = D x P devices: each holds J / P peers and sees B / D images of every batch.

    step = (J / P) t(B / D) + sum of its all-reduces              nothing overlaps: an upper bound
    step >= max((J / P) t(B / D), sum of its all-reduces)         all of it does: a lower bound
    all-reduce = 2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency              a ring of n devices
    memory = fixed + S n_w + max((J / P) A(B / D), 8 n_w if D > 1) + data set,    n_w = (J / P) W + M

t(b): seconds of a step of one peer on b images of one device, A(b) its activations; both are measured at two batch
sizes, with a straight line through them. W and M: how many numbers a peer and the method's part here train. S bytes are
kept for each: its value, gradient and momentum in float32, 12, and under autocast 2 more for the copy that a forward
makes. 8: gradients on their way, copied flat and summed, which is after the activations are gone.

The ring: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009. Its
bandwidth is the bus bandwidth of nccl-tests (doc/PERFORMANCE.md), which is that of the slowest link of the ring.
All n devices of a ring work at once, so a link that several rings share has to be divided by their number.
"""

from typing import NamedTuple

# Bytes of a number.
FLOAT, DOUBLE = 4, 8
WEIGHT, GRADIENT, MOMENTUM = FLOAT, FLOAT, FLOAT
HALF_COPY = 2
METHODS = ("baseline", "dml", "kdcl-mean", "cutnmix")  # those whose exchange is counted here, by their defaults


class Link(NamedTuple):
    """What every device of an axis has to its neighbour, in each direction."""

    bytes_per_s: float
    latency_s: float


class Line(NamedTuple):
    """y = fixed + slope x, neither below 0."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        """The line's y there."""
        return self.fixed + self.slope * x

    @classmethod
    def through(cls, one: tuple[float, float], other: tuple[float, float]) -> "Line":
        """Through two points with 0 < x_1 < x_2; where that would go below 0, through the second with the one at 0."""
        (x_1, y_1), (x_2, y_2) = one, other
        slope = (y_2 - y_1) / (x_2 - x_1)
        if slope < 0:
            return cls(y_2, 0.0)
        return cls(y_1 - slope * x_1, slope) if slope * x_1 <= y_1 else cls(0.0, y_2 / x_2)


class Job(NamedTuple):
    """What is to be trained."""

    method: str  # one of METHODS
    J: int
    B: int  # images of a step, on all devices together
    K: int
    D_f: int  # numbers of a peer's feature; D alone is the data axis here
    parameters: int  # W, of one peer
    dataset_bytes: int = 0  # kept by every device


class Single(NamedTuple):
    """What one peer costs on one device."""

    step_s: Line  # t, against images
    activation_bytes: Line  # A, against images
    fixed_bytes: float  # whatever the number of peers and images
    autocast: bool = False


class Mesh(NamedTuple):
    """D x P devices."""

    data: int
    peer: int

    def __str__(self) -> str:
        return f"{self.data} x {self.peer}"


class AllReduce(NamedTuple):
    """One in every step."""

    axis: str  # who takes part: data, peer, or all devices
    what: str
    bytes: int  # at each device


class Prediction(NamedTuple):
    """One mesh."""

    mesh: Mesh
    peers: int  # J / P
    images: int  # B / D
    memory_bytes: float  # of a device
    peer_bytes: int  # what a device adds to the all-reduces of a step along each axis
    data_bytes: int
    compute_s: float
    exchange_s: float
    fits: bool = True

    @property
    def step_s(self) -> float:
        """Nothing overlaps."""
        return self.compute_s + self.exchange_s

    @property
    def least_s(self) -> float:
        """All of the exchange is hidden behind the computation, or the other way round."""
        return max(self.compute_s, self.exchange_s)


def meshes(devices: int, J: int, B: int) -> tuple[list[Mesh], dict[Mesh, str]]:
    """All D x P = `devices` with P | J and D | B; and the others, each with the reason."""
    good, refused = [], {}
    for data in (d for d in range(1, devices + 1) if devices % d == 0):
        mesh = Mesh(data, devices // data)
        if J % mesh.peer:
            refused[mesh] = f"{J} peers cannot be cut into {mesh.peer} parts"
        elif B % data:
            refused[mesh] = f"a batch of {B} cannot be cut into {data} parts"
        else:
            good.append(mesh)
    return good, refused


def method_parameters(job: Job, mesh: Mesh) -> int:
    """M: numbers that the method trains on a device: of the peer teacher its peers' columns, and the bias."""
    return job.J // mesh.peer * job.D_f * job.K + job.K if job.method == "cutnmix" else 0


def exchanges(job: Job, mesh: Mesh) -> list[AllReduce]:
    """The all-reduces of a step. Those along the peer axis do not depend on J."""
    images, found = job.B // mesh.data, []
    if mesh.peer > 1:
        probs = AllReduce("peer", "probabilities and negentropies", FLOAT * images * (job.K + 1))
        means = AllReduce("peer", "mean features and their square", DOUBLE * (job.D_f + 1))
        logits = AllReduce("peer", "logits", FLOAT * images * job.K)
        found += {"baseline": [], "dml": [probs], "kdcl-mean": [logits], "cutnmix": [probs, means, logits]}[job.method]
    if mesh.data > 1:
        peers = job.J // mesh.peer
        if job.method == "cutnmix":
            found.append(AllReduce("data", "mean features and their count", FLOAT * (peers * job.D_f + 1)))
        trained = peers * job.parameters + method_parameters(job, mesh)
        found.append(AllReduce("data", "gradients", GRADIENT * trained))
    if mesh.data * mesh.peer > 1:
        found.append(AllReduce("all", "whether to stop", 8))  # an int64
    return found


def all_reduce_s(bytes: float, n: int, link: Link) -> float:
    """2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency: n - 1 times a part goes on to be added, then to be kept."""
    return 2 * (n - 1) * (bytes / n / link.bytes_per_s + link.latency_s)


def exchange_s(job: Job, mesh: Mesh, links: dict[str, Link]) -> float:
    """One all-reduce after the other. `links`: of the axes `peer` and `data`; all devices meet over the slower one."""
    sizes = {"peer": mesh.peer, "data": mesh.data}
    used = {axis: links[axis] for axis, n in sizes.items() if n > 1}
    seconds = 0.0
    for reduced in exchanges(job, mesh):
        if reduced.axis == "all":
            seconds += max(all_reduce_s(reduced.bytes, mesh.data * mesh.peer, link) for link in used.values())
        else:
            seconds += all_reduce_s(reduced.bytes, sizes[reduced.axis], links[reduced.axis])
    return seconds


def kept_bytes(autocast: bool) -> int:
    """S, for each number that is trained."""
    return WEIGHT + GRADIENT + MOMENTUM + (HALF_COPY if autocast else 0)


def memory_bytes(job: Job, mesh: Mesh, single: Single) -> float:
    """Of one device, at most."""
    trained = job.J // mesh.peer * job.parameters + method_parameters(job, mesh)
    activations = job.J // mesh.peer * single.activation_bytes.at(job.B // mesh.data)
    on_their_way = 2 * GRADIENT * trained if mesh.data > 1 else 0
    kept = kept_bytes(single.autocast) * trained
    return single.fixed_bytes + kept + max(activations, on_their_way) + job.dataset_bytes


def predict(
    job: Job, mesh: Mesh, single: Single, links: dict[str, Link], memory_limit: float | None = None
) -> Prediction:
    """What a step costs on a mesh of `meshes`."""
    found = exchanges(job, mesh)
    peer_bytes, data_bytes = (sum(each.bytes for each in found if each.axis == axis) for axis in ("peer", "data"))
    peers, images, memory = job.J // mesh.peer, job.B // mesh.data, memory_bytes(job, mesh, single)
    return Prediction(
        mesh=mesh,
        peers=peers,
        images=images,
        memory_bytes=memory,
        peer_bytes=peer_bytes,
        data_bytes=data_bytes,
        compute_s=peers * single.step_s.at(images),
        exchange_s=exchange_s(job, mesh, links),
        fits=memory_limit is None or memory <= memory_limit,
    )


def plan(
    job: Job, good: list[Mesh], single: Single, links: dict[str, Link], memory_limit: float | None = None
) -> list[Prediction]:
    """Of some of `meshes`: those that fit first, the fastest first among them."""
    predictions = [predict(job, mesh, single, links, memory_limit) for mesh in good]
    return sorted(predictions, key=lambda each: (not each.fits, each.step_s, each.memory_bytes))
