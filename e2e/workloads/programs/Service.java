// Inside the `jvm` image: a service with an embedded Tomcat and JSON, as most services on a JVM are.
//
//     java Service PORT
//
// GET /health answers 200. Ends with its standard input where that is a pipe, as whoever started it holds.

import com.fasterxml.jackson.databind.ObjectMapper;
import jakarta.servlet.http.HttpServlet;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import org.apache.catalina.Context;
import org.apache.catalina.startup.Tomcat;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

public class Service extends HttpServlet {
    private static final Logger LOG = LoggerFactory.getLogger(Service.class);
    private final ObjectMapper json = new ObjectMapper();

    @Override
    protected void doGet(HttpServletRequest request, HttpServletResponse response) throws IOException {
        response.setContentType("application/json");
        json.writeValue(response.getOutputStream(), Map.of("status", "UP"));
    }

    public static void main(String[] arguments) throws Exception {
        System.out.println("java runs");
        Path folder = Files.createTempDirectory("tomcat");
        Tomcat tomcat = new Tomcat();
        tomcat.setBaseDir(folder.toString());
        tomcat.setPort(Integer.parseInt(arguments[0]));
        Context context = tomcat.addContext("", folder.toString());
        Tomcat.addServlet(context, "health", new Service()).setLoadOnStartup(1);
        context.addServletMappingDecoded("/health", "health");
        tomcat.getConnector();
        tomcat.start();
        LOG.info("listening");
        System.out.println("ready " + arguments[0]);
        if (Files.readSymbolicLink(Path.of("/proc/self/fd/0")).toString().startsWith("pipe:")) {
            while (System.in.read() >= 0) { }
            System.exit(0);
        }
        tomcat.getServer().await();
    }
}
