"""Reading of AnnData: set-up, counts, gene panels and their alignment.

Nothing is imported here, so that ``genejepa.data.panel`` loads with only numpy present.
"""
