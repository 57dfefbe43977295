"""The commands of ``governor fleet``: a server for one host, and what one does with a fleet by hand."""
