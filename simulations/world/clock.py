"""What a training would take on the client's own device and link, and whether it ends at all.

    seconds = download + slowdown * (training + training of own factors) + upload
    joules  = the board's watts * training seconds + the radio's watts * transfer seconds

The training's seconds are a roofline of the model's shape (``step_costs.py``) over the device's
rates (``rates.py``), the transfers' of the link (``links.py``); stragglers and drop-outs come from
the population. The rest of the machine (a card's host, a phone's screen), what a board draws while
it waits, a radio's tail after a transfer, and the looks at the loss before and after a training are
not counted.

With ``population.clock-model`` the shape is another model's: steps, rows and tokens are those that
were trained, and the bytes of factors are scaled by the ratio of the numbers in both models'
factors, so that the tiny base trains and the clock shows what a 7B would take. Its dtype is then
what the device would hold that model in: bfloat16 where it has that, else float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.planning.devices import Device
from flexlora.planning.memory_ranks import run_plan
from flexlora.planning.shapes import ModelShape, TrainingPlan
from flexlora.simulations.world.clock_models import clock_shape
from flexlora.simulations.world.populations import Population
from flexlora.simulations.world.rates import rates_of
from flexlora.simulations.world.step_costs import adapter_numbers, train_seconds, training_work

__all__ = ["Clock", "Effort", "OwnTraining", "Price"]


@dataclass(frozen=True, kw_only=True)
class OwnTraining:
    """The training of personal factors, before the client answers."""

    rank: int
    tokens: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The work of one training and its transfers.

    ``steps`` steps over ``tokens`` padded tokens in all; bytes are those of the messages that are
    really sent, with the trained model's factors. ``looks`` are batches whose gradient turns
    ``lora_A``, their tokens among ``tokens``.
    """

    client_id: str
    server_round: int
    rank_class: RankClass
    quantization: str
    tokens: int
    steps: int
    bytes_down: int
    bytes_up: int
    looks: int = 0
    own: OwnTraining | None = None


@dataclass(frozen=True, kw_only=True)
class Price:
    """Predicted cost of one training; ``leaves_after`` is None where the client stays."""

    download_seconds: float
    train_seconds: float
    upload_seconds: float
    latency_seconds: float = 0.0  # of the download, before its first byte
    leaves_after: float | None = None
    train_watts: float = 0.0
    radio_watts: float = 0.0

    @property
    def seconds(self) -> float:
        """From the first byte down to the last byte up, if the client stays."""
        return self.download_seconds + self.train_seconds + self.upload_seconds

    def downloaded_until(self, seconds: float) -> float:
        """The share of the bytes down that had come by then."""
        if seconds >= self.download_seconds:
            return 1.0
        arriving = self.download_seconds - self.latency_seconds
        return max(0.0, seconds - self.latency_seconds) / arriving

    def joules_until(self, seconds: float) -> float:
        """Energy spent up to ``seconds`` after the start."""
        down = min(max(seconds, 0.0), self.download_seconds)
        train = min(max(seconds - self.download_seconds, 0.0), self.train_seconds)
        rest = seconds - self.download_seconds - self.train_seconds
        up = min(max(rest, 0.0), self.upload_seconds)
        return self.train_watts * train + self.radio_watts * (down + up)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Prices trainings; ``shape`` is the model that counts, ``trained_shape`` the one trained."""

    population: Population
    shape: ModelShape
    trained_shape: ModelShape
    plan: TrainingPlan
    accumulation: int = 1

    @staticmethod
    def from_config(config: Config, population: Population) -> Clock | None:
        """The clock of a run, None where no devices are simulated.

        Raises:
            UserError: a model whose sizes cannot be read.
        """
        if not population.has_hardware:
            return None
        try:
            trained_shape, plan = run_plan(config)
        except UserError as error:
            raise UserError(
                f"population.devices needs the sizes of model.name for its clock: {error}"
            ) from None
        return Clock(
            population=population,
            shape=_counted_shape(config, trained_shape),
            trained_shape=trained_shape,
            plan=plan,
            accumulation=config.train.gradient_accumulation_steps,
        )

    def price(self, effort: Effort) -> Price:
        """Seconds, watts and the end of a client's training.

        Raises:
            UserError: a client that is not in the population, or whose device is not simulated.
        """
        client_id, server_round, own = effort.client_id, effort.server_round, effort.own
        rank_class, quantization = effort.rank_class, effort.quantization
        client = self.population.client(client_id)
        if client.device is None:
            raise UserError(f"client '{client_id}' has no simulated device to price a training on.")
        carried = self._carried(self.shape, rank_class)
        seconds = self._train_seconds(
            client.device,
            rank_class,
            quantization,
            carried,
            effort.tokens,
            effort.steps,
            effort.looks,
        )
        if own is not None:
            # The received factors are frozen beside the personal ones.
            carried += self._numbers(self.shape, rank_class)
            kind = RankClass.of(own.rank)
            seconds += self._train_seconds(
                client.device, kind, quantization, carried, own.tokens, own.steps
            )
        down, up = self._scales(rank_class)
        link = client.link
        price = Price(
            download_seconds=link.download_seconds(down * effort.bytes_down) if link else 0.0,
            train_seconds=self.population.slowdown(client_id, server_round) * seconds,
            upload_seconds=link.upload_seconds(up * effort.bytes_up) if link else 0.0,
            latency_seconds=link.latency_seconds if link and effort.bytes_down else 0.0,
            train_watts=rates_of(client.device).watts,
            radio_watts=link.watts if link else 0.0,
        )
        part = self.population.leaves_at(client_id, server_round)
        return price if part is None else replace(price, leaves_after=part * price.seconds)

    def _train_seconds(
        self,
        device: Device,
        rank_class: RankClass,
        quantization: str,
        carried: int,
        tokens: int,
        steps: int,
        looks: int = 0,
    ) -> float:
        dtype = self.plan.dtype
        if self.shape is not self.trained_shape:
            halves = self.shape.dtype in ("bfloat16", "float16")
            dtype = "bfloat16" if halves and device.bfloat16 else "float32"
        elif dtype == "bfloat16" and not device.bfloat16:
            dtype = "float32"  # its 16-bit units do not compute in that format
        plan = replace(self.plan, rank=rank_class.largest, quantization=quantization, dtype=dtype)
        work = training_work(
            self.shape,
            plan,
            trained=self._numbers(self.shape, rank_class),
            carried=carried,
            tokens=tokens,
            steps=steps,
            accumulation=self.accumulation,
            looks=looks,
        )
        return train_seconds(work, rates_of(device), dtype)

    def _scales(self, rank_class: RankClass) -> tuple[float, float]:
        """What bytes down and up are multiplied by: trained and carried numbers, and trained."""
        if self.shape is self.trained_shape:
            return 1.0, 1.0
        ours, theirs = (self._numbers(x, rank_class) for x in (self.shape, self.trained_shape))
        carried, tiny = (self._carried(x, rank_class) for x in (self.shape, self.trained_shape))
        return (ours + carried) / (theirs + tiny), ours / theirs

    def _numbers(self, shape: ModelShape, rank_class: RankClass) -> int:
        return adapter_numbers(shape, rank_class, self.plan.target_modules)

    def _carried(self, shape: ModelShape, rank_class: RankClass) -> int:
        """Numbers carried, as if the global change had all of its carried rank already."""
        rank = rank_class.carried_rank or self.plan.carried_rank
        return self._numbers(shape, RankClass.of(rank)) if rank else 0


def _counted_shape(config: Config, trained_shape: ModelShape) -> ModelShape:
    name = config.population.clock_model
    if not name:
        return trained_shape
    try:
        shape = clock_shape(name)
        shape.targets(config.lora.target_modules)
        return shape
    except UserError as error:
        raise UserError(f"population.clock-model is '{name}': {error}") from None
