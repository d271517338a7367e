"""The BIDS App: a data set → prepared scans and their embeddings as BIDS derivatives (participant), all in one (group).

    call          what a call says
    selection     which scans a call is of, by labels, filters and derivatives
    participant   prepares and embeds them, a file each
    group         the table of all scans, one of embeddings a model, and the page

The data set that is read is never written to.
"""
