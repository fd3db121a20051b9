"""Where metrics go beside the run's own files: a file each, all with the interface of `sink.Sink`."""
