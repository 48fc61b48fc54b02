"""A page of a spool's live and uncollected runs: dashboard.py SPOOL PORT, then http://127.0.0.1:PORT/"""

import html
import http.server
import sys

import chaperone

spool = chaperone.Spool(sys.argv[1])


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        rows = "<tr><th>run<th>state<th>exit code<th>signal<th>started<th>last lines"
        for run in [*spool.live(), *spool.ended()]:
            try:
                status = run.status()
                lines = run.read(offset=max(0, run.size() - 500)).decode(errors="replace")
            except chaperone.NoRunError:  # deleted meanwhile
                continue
            facts = (run.run_id, status.state, status.return_code, status.signal, status.start_time)
            rows += "\n<tr><td>" + "<td>".join(html.escape(str(fact)) for fact in facts)
            rows += f"<td><pre>{html.escape(lines)}</pre>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(f'<meta http-equiv="refresh" content="5"><table>{rows}'.encode())


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Page).serve_forever()
