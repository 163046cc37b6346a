"""The authors' released estimator and critic, for replication."""
