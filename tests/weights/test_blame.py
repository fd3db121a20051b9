from megatron_async_rlhf.weights.blame import account, root_cause

SILENCE = "nothing moved for 6 s (weights.timeout_s)"
GONE = "the connection is gone: that process ended"


def test_the_silent_member_is_to_blame_not_those_who_wait_for_each_other():
    accounts = [
        account("receive of the verdict from", "learner rank 0", "learner rank 1", SILENCE),
        account("receive of the digests from", "generator.1 rank 0", "learner rank 0", SILENCE),
        account("receive of round 2 (lm_head.weight[0:4, 0:8]) from", "learner rank 1", "generator.0 rank 0", GONE),
    ]
    for order in (accounts, accounts[::-1]):
        assert root_cause(order) == accounts[1]


def test_an_error_of_ones_own_comes_before_any_accusation():
    own = "load: model.norm.weight[0:16, 0:1] should go to row 0"
    accusation = account("receive of the digests from", "generator.0 rank 0", "learner rank 0", GONE)
    assert root_cause([accusation, own]) == own


def test_silence_comes_before_a_closed_connection_and_the_earliest_first():
    closed = account("send of round 1 (x[0:1, 0:1]) to", "generator.0 rank 0", "learner rank 0", GONE)
    silent = account("receive of round 1 (y[0:1, 0:1]) from", "generator.1 rank 1", "generator.2 rank 1", SILENCE)
    assert root_cause([closed, silent]) == silent
    assert root_cause([closed]) == closed
    other = account("send of round 2 (x[0:1, 0:1]) to", "generator.0 rank 0", "learner rank 2", GONE)
    assert root_cause([closed, other]) == closed
