"""What W&B is told, read from what it keeps of an offline run: every value at the step that it is of."""

from wandb_records import rows, wait_until_written

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.telemetry.sinks.wandb import WandbSink


def test_values_stand_at_their_step(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    model = "model={layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}"
    config = load_config(
        tmp_path / "config.yaml", [model, "warm_start.steps=2", "telemetry.wandb={mode: offline}", "schedule.steps=3"]
    )
    log = WandbSink(config, config.telemetry.wandb, tmp_path)
    for step in (1, 2):
        log.warm_start(step, {"loss": step / 2})
    log.evaluation(0, 0, {"eval/reward": 0.25})
    for step in (1, 2, 3):
        log.step(step, {"loss": float(step)})
        if step == 2:  # of the version before, which took until now
            log.evaluation(1, 2, {"eval/reward": 0.5})
    log.evaluation(3, 3, {"eval/reward": 0.75})
    log.close({}, failed=False)
    wait_until_written(tmp_path)

    def told(name: str) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for _, row in sorted(rows(tmp_path).items()) if name in row]

    assert told("warm_start/loss") == [(-1, 0.5), (0, 1.0)]
    assert told("loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert told("eval/reward") == [(0, 0.25), (1, 0.5), (3, 0.75)]
