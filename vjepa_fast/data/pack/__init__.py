"""Packs: videos as tar shards of JPEG frames at the rate of the clips, with an index for random access.

A pack is a folder:

    shard-000000.tar ...   WebDataset: of video 12 the members 00000012.000000.jpg, 00000012.000001.jpg ... and
                           00000012.json (label, rate, sizes, where it comes from), one behind the other
    pack.index             where every frame lies (vjepa_fast.data.pack.index); written last, so without it the pack is
                           unfinished
    broken.tsv             path and reason of what could not be packed, where there is any

`vjepa-fast pack` makes one (writer), and its folder or address is then an entry of `data.datasets` (reader).
"""
