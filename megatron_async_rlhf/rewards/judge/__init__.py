"""A language model as judge of answers: asked over HTTP, remembered on disk, kept within a budget.

    question (template) ──> answer store ──(not there)──> endpoint: budget, retries ──> verdict

`judge.Judge` knows nothing of runs; `reward.JudgeReward` makes a reward of it.
"""
