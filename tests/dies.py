"""What a process of a benchmark may do: measure, die by a signal, end by itself."""
import os
import signal


def work(pipe, rows, jobs):
  """Sends the name of each job that has no row yet, and then its row; dies of those named after how."""
  for job in jobs[len(rows):]:
    pipe.send(({'part': job}, None))
    if job == 'crash': os.kill(os.getpid(), signal.SIGKILL)
    if job == 'exit': os._exit(3)
    pipe.send(({'part': job}, {'part': job, 'ms': 1.0}))
  if not jobs: os._exit(4)
