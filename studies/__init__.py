"""One room a method or page: its recipes, table rows and pictures.

Shared rooms: results, comparison and report write the documents; ledger, status, pulse and runner say which results
stand and run what is due.
"""
