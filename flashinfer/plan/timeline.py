"""When, within a token, the CPU computes and the flash reads: the two clocks of the cost model."""

from collections import defaultdict

from flashinfer.paper.flash import PIECE_BYTES
from flashinfer.plan.profile import Profile

UNITS, STREAMS = "waiting for reads", "waiting for streams"
SPIN = 2e-4  # seconds after which a thread that has nothing to compute sleeps


class Timeline:
    """Follows a token as the engine does: compute, submit reads, wait for them.

    The flash takes what is submitted in turn: a batch takes as long as ``Profile.batch_seconds``
    says or, behind another one, what its reads take of the flash's time.

    now      seconds since the token began
    seconds  {part: seconds of the CPU's, waiting included}; they add up to ``now``
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.now = 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.free = 0.0  # when the flash will have done all that was submitted
        self.multiplied = 0.0  # when the last product was done
        self.requests = self.nbytes = 0.0  # read since the token began

    def compute(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds
        self.now += seconds

    def multiply(self, part: str, seconds: float) -> None:
        """Compute with all threads, which may have to be woken."""
        if seconds > 0:
            asleep = self.now - self.multiplied > SPIN
            self.compute(part, seconds + asleep * self.profile.wake)
            self.multiplied = self.now

    def submit(self, requests: float, nbytes: float) -> float:
        """Begin reads of ``nbytes`` in all; return when they will be done."""
        if requests <= 0:
            return self.now
        size = nbytes / requests
        by_itself = self.now + self.profile.batch_seconds(requests, nbytes)
        behind = self.free + requests * self.profile.read_seconds(size)
        self.free = max(by_itself, behind)
        done = max(self.free, self._allowed(requests, nbytes))
        self.compute("submitting reads", requests * self.profile.submit_seconds(size))
        return done

    def _allowed(self, requests: float, nbytes: float) -> float:
        """When what the flash is held to allows these, too: what a token did not use while it
        computed it may use later."""
        self.requests += requests
        self.nbytes += nbytes
        return self.profile.allowed_after(self.requests, self.nbytes)

    def wait(self, done: float, part: str = UNITS) -> None:
        self.compute(part, max(0.0, done - self.now))

    def stream(self, part: str, nbytes: float, tile_bytes: float, seconds: float) -> None:
        """A tensor in tiles, each read while the one before is computed, ``seconds`` in all."""
        speed = self.profile.stream_speed(min(tile_bytes, nbytes))
        self.free = max(self.now, self.free) + nbytes / speed
        done = max(self.free, self._allowed(nbytes / PIECE_BYTES, nbytes))
        self.multiply(part, seconds)
        self.wait(done, STREAMS)
