"""Colours of the pictures and of the panel, by role."""

BACKGROUND, GRID, RULE = "#202020", "#383838", "#585858"
TEXT, FAINT = "#e6e6e6", "#a2a2a2"
WARM_UP, DENSE, SPARSE, REUSED = "#c98bdb", "#9aa3b2", "#4fb477", "#3f8fd2"  # attention, by kind of step
PLANNING, REST = "#e8b04a", "#5b6f96"
ESTIMATED_ERROR = "#e07a5f"
REQUESTED, EXECUTED = "#4fc1c9", "#2c6f78"  # density
COMPUTED, SKIPPED, OWN = SPARSE, "#2b3343", "#ffa53c"  # keys of a tile, and the tile itself
RAMP = ("#222a3c", "#28617c", "#3fa37c", "#a5d152", "#fde725")  # of density, from 0 to the highest

ATTENTION = {"warm-up": WARM_UP, "dense": DENSE, "sparse": SPARSE, "reused": REUSED}  # by kind of step
PANEL = {
    **ATTENTION,
    "planning": PLANNING,
    "rest": REST,
    "estimated-error": ESTIMATED_ERROR,
}  # the variables of web/js/panel.css
