"""The replaced layers, one file a kind; `common.py` holds a layer against one whose weight is mixed by hand."""
