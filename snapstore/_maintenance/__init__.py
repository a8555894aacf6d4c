"""Look after a root without a store: list, inspect, verify, prune, count, examine. Nothing here prints.

    root       a root, open; everything below it goes by descriptor
    survey     what lies there, by names and status alone
    listing    rows of it, filtered and sorted
    headers    what one file says of itself
    verify     whether the files are what was written
    plan       what a prune would remove: a pure function
    prune      doing that
    aside      taking a file away from under a store
    totals     a root in figures
    doctor     whether machine and disk are fit
    units      sizes and durations as text

Safe beside live stores: it reads what they read, and removes only under the lock of a dead owner, or by the owner's own
rule of renaming aside first.
"""
