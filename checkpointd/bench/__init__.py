"""`checkpointd bench`: what protection costs, as ratios.

A *scenario* measures one thing of ours in turns with a *limit* (what this machine can do at best) or a *rival* (how it
is done elsewhere), so that both meet the same machine, and gives ratios with their spread; absolute times are shown
beside them and mean nothing anywhere else. A goal that is missed fails nothing: docs/performance.md says why.

turns: measuring in turns, and what comes of it (pure but for the calls it is given) · machine: on what was measured ·
standin: a domain for the native pause, with floors and rivals in csrc/ · scenarios/: one module for each · report: as
text, JSON and Markdown · plots.
"""
