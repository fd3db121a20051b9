"""One page about runs: figures, advice, curves, timeline, samples, configuration.

run directory ──► run.py: what the page needs of it ──► advice.py: what could be better
                                    └─► page.py: HTML, with the data of the curves packed inside
"""
